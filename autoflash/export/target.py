"""Target: one form of export, and the list of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autoflash.errors import UnknownName
from autoflash.export.selection import Selection

TARGETS: Mapping[str, str] = {
    "package": "autoflash.export.package",
    "hf-kernel": "autoflash.export.hf_kernel",
    "json": "autoflash.export.json",
    "flex": "autoflash.export.flex",
    "triton-configs": "autoflash.export.triton_configs",
    "kernel-tuner": "autoflash.export.kernel_tuner",
    "cuda-header": "autoflash.export.cuda_header",
}
"""Name on the command line -> the module whose TARGET it is; imported when it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may choose of an export.

    Attributes:
        name: of the package or the like; None leaves it to the target.
        binaries: whether kernels are compiled now and shipped, where the target can do so.
        progress: told what takes long, a line at a time.
    """

    name: str | None = None
    binaries: bool = True
    progress: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One form of export.

    Attributes:
        name: on the command line.
        summary: one line: what it is and who loads it.
        templates: glob of the names of templates whose winners it takes.
        files: what it writes: path below the folder, with forward slashes -> content. The same
            selection and options give the same bytes.
    """

    name: str
    summary: str
    templates: str
    files: Callable[[Selection, Options], Mapping[str, str | bytes]]


def target(name: str) -> Target:
    """The target of that name, or UnknownName."""
    if name not in TARGETS:
        raise UnknownName.of("export target", name, TARGETS)
    found: Target = importlib.import_module(TARGETS[name]).TARGET
    return found
