"""The `triton-configs` target: a Python file of triton.Configs that seeds an autotuner's cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoflash.export.header import comment, evidence
from autoflash.export.selection import Entry, Selection
from autoflash.export.target import Options, Target

_FILE = Path(__file__).with_name("seeding.py")
"""The file that is written, but for its data."""
_START, _END = 'DEVICE = ""\n', "# {end of data}\n"
_FIELDS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
"""What triton.Config has fields for; everything else is a meta-parameter of the kernel."""


def _files(selection: Selection, options: Options) -> Mapping[str, str]:
    module = options.module(f"autoflash_{selection.device.slug.replace('-', '_')}")
    text = _FILE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_START)
    _, _, after = rest.partition(_END)
    before = before.replace("{module}", module).replace("# {header}\n", comment(selection, "#"))
    return {f"{module}.py": before + _data(selection) + after}


def _data(selection: Selection) -> str:
    """The constants of seeding.py. Shapes that take longest come last, as `seed` wants them."""
    entries = sorted(selection.entries, key=lambda e: (e.record.latency_us or 0, e.problem.name))
    newest = max(entries, key=lambda entry: entry.record.created)
    lines = [
        f"DEVICE = {selection.device.name!r}",
        '"""As PyTorch names it."""',
        f"SM = {selection.device.capability}",
        '"""Compute capability times ten."""',
        f"TRITON = {newest.record.environment.get('triton')!r}",
        '"""Which compiled the kernels that were measured."""',
        "SHAPES = {",
        *(f"    {entry.problem.name!r}: {_shape(entry)!r}," for entry in entries),
        "}",
        '"""Problem -> its dtype, sizes and mask; those that take longest come last."""',
        "CONFIGS = {",
    ]
    for entry in entries:
        lines += [f"    # {evidence(entry)}", f"    {entry.problem.name!r}: {_config(entry)},"]
    lines += ["}", '"""Problem -> the best config known for it."""', ""]
    return "\n".join(lines)


def _shape(entry: Entry) -> dict[str, Any]:
    return {**entry.problem.to_dict(), "group_size": entry.problem.group_size}


def _config(entry: Entry) -> str:
    """The expression that makes the triton.Config."""
    fields = {name: value for name, value in entry.source.options.items() if name in _FIELDS}
    kwargs = {name: value for name, value in entry.config.items() if name not in fields}
    return f"triton.Config({kwargs!r}, {', '.join(f'{k}={v!r}' for k, v in fields.items())})"


TARGET = Target(
    name="triton-configs",
    summary="A Python file of triton.Configs that seeds the cache of an autotuned Triton kernel.",
    templates="triton/*",  # Gluon has no triton.Config: its kernels place data and warps themselves
    stand_ins=True,
    files=_files,
)
