"""What `presets` prints: models with their attention layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from autoflash.cli.output import say, table, write_json
from autoflash.workload.presets import Attention, Preset


def listed(presets: Sequence[Preset], as_json: bool) -> None:
    """One row per kind of attention layer."""
    if as_json:
        write_json([dataclasses.asdict(preset) for preset in presets])
        return
    rows = [
        (
            preset.name if first else "",
            kind.layers,
            f"{kind.heads}/{kind.kv_heads or kind.heads}",
            f"{kind.head_dim}x{kind.head_dim_v}" if kind.head_dim_v else kind.head_dim,
            _mask(kind),
            _lengths(preset, kind) if first or kind.seqlen else "",
            preset.source if first else "",
        )
        for preset in presets
        for first, kind in ((kind is preset.attention[0], kind) for kind in preset.attention)
    ]
    columns = ("preset", ">layers", ">heads", ">head_dim", "mask", "lengths", "source")
    table("Models that --preset takes", columns, rows)
    say("`autoflash plan --preset NAME` shows the problems of one for the device found here.")


def _mask(kind: Attention) -> str:
    parts = (
        "causal" if kind.causal else "full",
        f"window {kind.sliding_window}" if kind.sliding_window else "",
        f"softcap {kind.softcap:g}" if kind.softcap else "",
        "no decoding" if kind.causal and not kind.decode else "",
    )
    return ", ".join(part for part in parts if part)


def _lengths(preset: Preset, kind: Attention) -> str:
    if not kind.seqlen:
        return f"up to {preset.context}" if preset.context else "any"
    keys = f" x {kind.seqlen_k}" if kind.seqlen_k else ""
    return ", ".join(f"{length}{keys}" for length in kind.seqlen)
