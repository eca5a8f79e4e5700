"""Exports: what was tuned, in forms that other projects load. One file per target."""

from autoflash.export.bundle import Bundle, read, write
from autoflash.export.selection import Entry, Selection, select
from autoflash.export.target import TARGETS, Options, Target, target

__all__ = [
    "TARGETS",
    "Bundle",
    "Entry",
    "Options",
    "Selection",
    "Target",
    "read",
    "select",
    "target",
    "write",
]
