"""Which kernel_options is FlexAttention to be called with? A table, and a module that picks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoflash.build import flex
from autoflash.errors import BuildError, InvalidInput
from autoflash.export import flex_options
from autoflash.export.header import comment, entry_dict, header
from autoflash.export.selection import Entry, Selection
from autoflash.export.target import Options, Target

TABLE, PICKER, INDUCTOR = flex_options.TABLE, "flex_options.py", "inductor_flex_configs.txt"
PROMISES = ("fwd_BLOCKS_ARE_CONTIGUOUS", "fwd_ROWS_GUARANTEED_SAFE")
"""Options that are true of a mask and wrong of others: never for one with padding or documents."""
_TILE = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_stages", "fwd_num_warps")


def files(selection: Selection, options: Options) -> dict[str, str]:
    """The table, the module that picks from it, and what PyTorch's own table would say.

    Raises:
        InvalidInput: the installed FlexAttention does not know one of the options.
    """
    entries = [_entry(entry) for entry in selection.entries]
    for entry in entries:
        try:
            flex.require_known(entry["kernel_options"], entry["name"])
        except BuildError as error:
            raise InvalidInput(str(error)) from error
    table = {"header": header(selection), "entries": entries}
    picker = Path(flex_options.__file__).read_text(encoding="utf-8")
    return {
        TABLE: json.dumps(table, indent=1, sort_keys=True) + "\n",
        PICKER: picker,
        INDUCTOR: _inductor(selection, entries),
    }


def _entry(entry: Entry) -> dict[str, Any]:
    """A winner: `entry_dict`, what goes into flex_attention, and what that gains."""
    told = entry_dict(entry)
    known = flex.constants(entry.source.text)
    options = known["KERNEL_OPTIONS"]
    default_us, latency_us = told["default_us"], told["latency_us"]
    return {
        **told,
        "kernel_options": options,
        "mask_promises": [name for name in PROMISES if name in options],
        "mask_block": known["MASK_BLOCK"],
        "gain": round(default_us / latency_us, 4) if default_us and latency_us else None,
    }


def _inductor(selection: Selection, entries: list[dict[str, Any]]) -> str:
    """The winners as entries of the table in torch/_inductor/template_heuristics/triton.py.

    It has one tile for each dtype and head_dim, whatever the shape: every tile that won is listed
    with where it did, and one who edits that table chooses.
    """
    lines = [
        comment(selection, "#"),
        "# FlexConfig(block_m, block_n, num_stages, num_warps), and for what it won over the\n"
        "# default; options named after a gain were set beside the tile.\n",
    ]
    kinds: dict[tuple[str, int], dict[str, list[str]]] = {}
    for entry in entries:
        problem, options = entry["problem"], entry["kernel_options"]
        tile = [str(options[name]) for name in _TILE if name in options]
        what = f"FlexConfig({', '.join(tile)})" if tile else "no other tile than the default's"
        others = [name.removeprefix("fwd_") for name in options if name not in _TILE]
        won = f"{entry['name']} {entry['gain']}x" + f" ({', '.join(others)})" * bool(others)
        kind = (problem["dtype"], problem["head_dim"])
        kinds.setdefault(kind, {}).setdefault(what, []).append(won)
    for (dtype, head_dim), tiles in sorted(kinds.items()):
        for what, where in sorted(tiles.items(), key=lambda pair: (-len(pair[1]), pair[0])):
            mark = "" if what.startswith("FlexConfig") else "# "
            lines.append(f"{mark}(torch.{dtype}, {head_dim}): {what},\n")
            lines += [f"#   {each}\n" for each in where]
    return "".join(lines)


TARGET = Target(
    name="flex",
    summary="The kernel_options of PyTorch's FlexAttention, tuned on FlexAttention itself.",
    templates="flex/*",
    files=files,
    op="flex",
)
