"""Warnings of the serving path: each reason is told once per process."""

from __future__ import annotations

import warnings

_told: set[str] = set()
_MOST = 1000  # a program that finds more reasons than this hears some of them twice


def once(message: str) -> None:
    """Give a RuntimeWarning unless this very message was given before."""
    if message in _told:
        return
    if len(_told) >= _MOST:
        _told.clear()
    _told.add(message)
    # The frames in between are ours; which of them, depends on how the call came here.
    warnings.warn(message, RuntimeWarning, stacklevel=_frames_of_ours())


def forget() -> None:
    """Let every reason be told again."""
    _told.clear()


def _frames_of_ours() -> int:
    """The stacklevel, for a call in `once`, of the innermost frame outside this package."""
    import sys

    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("autoflash."):
        frame = frame.f_back
        level += 1
    return level
