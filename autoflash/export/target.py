"""Target: one form of export, and the list of them."""

from __future__ import annotations

import importlib
import keyword
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autoflash.errors import InvalidInput, UnknownName
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

    def named(self, default: str, pattern: str, rule: str) -> str:
        """The name that was asked for, or `default`.

        Args:
            default: taken as it is.
            pattern: of names that will do.
            rule: the same in words.

        Raises:
            InvalidInput: the name asked for is none of these.
        """
        if self.name is None or re.fullmatch(pattern, self.name, re.ASCII):
            return self.name or default
        raise InvalidInput(f"--name {self.name!r} will not do here: {rule}, such as {default}.")

    def module(self, default: str) -> str:
        """The name that was asked for, dashes being underscores, as that of a Python module.

        Args:
            default: likewise, where none was asked for.

        Raises:
            InvalidInput: it is none, or would hide a module that Python or the export needs.
        """
        name = (self.name or default).replace("-", "_")
        if not name.isidentifier() or keyword.iskeyword(name):
            raise InvalidInput(
                f"--name {self.name!r} will not do here: a Python module has a name of letters, "
                "digits and underscores that does not begin with a digit and is no keyword, such "
                f"as {default}."
            )
        if name in _TAKEN:
            raise InvalidInput(
                f"--name {self.name!r} will not do here: it would hide the module {name} from "
                f"whoever imports that, the export among them. Choose another, such as {default}."
            )
        return name


_TAKEN = sys.stdlib_module_names | {"autoflash", "kernels", "numpy", "torch", "triton"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One form of export.

    Attributes:
        name: on the command line.
        summary: one line: what it is and who loads it.
        templates: glob of the names of templates whose winners it takes.
        op: of the problems that it is of, where those are not attention()'s.
        stand_ins: whether the fastest trial of its templates will do where none of them won: what
            it writes is for a kernel of that kind, and is of use however fast others are.
        trials: whether it writes trials, not winners only.
        files: what it writes: path below the folder, with forward slashes -> content. The same
            selection and options give the same bytes.
    """

    name: str
    summary: str
    templates: str
    op: str | None = None
    stand_ins: bool = False
    trials: bool = False
    files: Callable[[Selection, Options], Mapping[str, str | bytes]]


def target(name: str) -> Target:
    """The target of that name, or UnknownName."""
    if name not in TARGETS:
        raise UnknownName.of("export target", name, TARGETS)
    found: Target = importlib.import_module(TARGETS[name]).TARGET
    return found
