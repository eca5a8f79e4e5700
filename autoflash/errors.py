"""Every error a user can meet, in one tree.

AutoflashError
├── InvalidInput          a call or a command line that cannot be meant (also a ValueError)
│   ├── UnknownName       a name that is not in a list: arch, template, grid, column
│   └── UnsupportedProblem  a well-formed request that nothing here can run
├── TemplateError         a mistake in a template file, with file, line and name
├── BuildError            source could not become a kernel
│   ├── CompileError      the compiler rejected it
│   └── ToolchainMissing  there is no compiler to ask
├── CacheError            the cache directory cannot be read, written or locked
├── DatabaseError         the tuning database cannot be used
│   ├── DatabaseCorrupt   it is not a database, or rows in it do not parse
│   └── DatabaseNewer     a newer autoflash wrote it
└── WorkerError           the process that runs candidates could not be started

A message names the value, the limit, the place and the next step. What happens to one candidate
during tuning is not an error but an outcome (autoflash.record.Outcome).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoflashError(Exception):
    """Base of every error autoflash raises on purpose; the CLI prints it and exits with 2."""


class InvalidInput(AutoflashError, ValueError):
    """An argument has a value that no kernel could be asked for."""


class UnknownName(InvalidInput):
    """A name is not one of those known; the message lists them and the nearest."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownName:
        """Build the error for `name`, a `kind` (such as "arch"), out of the `known` names."""
        choices = sorted(known)
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(choices) if choices else "(none)"
        return cls(f"unknown {kind} {name!r}.{hint} Known: {listed}.")


class UnsupportedProblem(InvalidInput):
    """The request is well formed, but neither a template nor PyTorch can run it here."""


class TemplateError(AutoflashError):
    """A template file has a mistake; `path` and `line` say where."""

    def __init__(self, path: object, line: int | None, message: str) -> None:
        where = f"{path}:{line}" if line else f"{path}"
        super().__init__(f"{where}: {message}")
        self.path = path
        self.line = line


class BuildError(AutoflashError):
    """Source could not be turned into a kernel."""


class CompileError(BuildError):
    """The compiler rejected rendered source; `log` holds all it said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log

    def __reduce__(self) -> tuple[type[CompileError], tuple[str, str]]:
        return type(self), (str(self), self.log)


class ToolchainMissing(BuildError):
    """A compiler that the kernel needs is not installed."""


class CacheError(AutoflashError):
    """The cache directory cannot be used as asked."""


class DatabaseError(AutoflashError):
    """The tuning database cannot be used as asked."""


class DatabaseCorrupt(DatabaseError):
    """The file is not a database of ours, or is damaged."""


class DatabaseNewer(DatabaseError):
    """The database was written by a newer autoflash."""


class WorkerError(AutoflashError):
    """The process that runs candidates could not be started or kept alive."""
