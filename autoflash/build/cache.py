"""Cache of built kernels: content digest -> directory, published by one rename.

Safe to delete at any time, to share between processes, and to be read-only: what cannot be written
is built in a directory of this process instead, and one warning says so.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from autoflash import settings
from autoflash.errors import CacheError

LOCK_TIMEOUT_S = 300.0
"""Longest wait for another process that builds the same kernel; nvcc may take minutes."""


def find_or_make(digest: str, fill: Callable[[Path], None]) -> Path:
    """The directory of a digest, made by `fill` where it does not exist yet.

    Args:
        digest: names the content: everything that decides what `fill` writes.
        fill: writes the files into the empty directory that it is given; what it raises
            passes through and leaves nothing behind.

    Returns:
        A directory that is complete: it was renamed into place after `fill` returned.

    Raises:
        CacheError: no space left, or another process has held the lock for LOCK_TIMEOUT_S.
    """
    top = root()
    final = top / "kernels" / digest[:2] / digest
    if final.is_dir():
        return final
    locks = top / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{digest}.lock", timeout=LOCK_TIMEOUT_S):
            if not final.is_dir():
                _publish(final, fill)
    except Timeout:
        raise CacheError(
            f"{locks}/{digest}.lock was held for more than {LOCK_TIMEOUT_S:.0f} s by another "
            "process. If none is building kernels, delete the file."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"no space left below {top} while building a kernel ({error}). Free some, or set "
                "AUTOFLASH_CACHE_DIR to another disk; everything already built is kept."
            ) from error
        raise
    return final


def _publish(final: Path, fill: Callable[[Path], None]) -> None:
    building = final.parent / f".building-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        fill(building)
        building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def root() -> Path:
    """Where built kernels go: the cache directory, or a private one where that is read-only."""
    chosen = settings.get().cache_dir
    return chosen if _writable(chosen) else _private_root()


@cache
def _writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{uuid.uuid4().hex}"  # threads may be here at once
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True  # reported with its own message when something is built
        warnings.warn(
            f"cannot write to the cache directory {directory} ({error}); kernels are built in a "
            "temporary directory and lost at exit. Set AUTOFLASH_CACHE_DIR to a writable one.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@cache
def _private_root() -> Path:
    import atexit

    directory = Path(tempfile.mkdtemp(prefix="autoflash-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
