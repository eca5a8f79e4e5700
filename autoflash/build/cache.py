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

LOCK_TIMEOUT_S = 900.0
"""Longest wait for another process that builds the same kernel; nvcc may take minutes."""


def find_or_make(digest: str, fill: Callable[[Path], None], *, request: str | None = None) -> Path:
    """The directory of a digest, made by `fill` where it does not exist yet.

    Args:
        digest: names the content: everything that decides what `fill` writes.
        fill: writes the files into the empty directory that it is given; what it raises
            passes through and leaves nothing behind.
        request: names what was asked for, without the compiler that answered: `find_built` finds
            by it what was made last.

    Returns:
        A directory that is complete: it was renamed into place after `fill` returned.

    Raises:
        CacheError: no space left, or another process has held the lock for LOCK_TIMEOUT_S.
    """
    if (found := _directory(settings.get().cache_dir, digest)).is_dir():
        return found  # also where nothing can be written
    top = root()
    final = _directory(top, digest)
    if final.is_dir():
        return final
    locks = top / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{digest}.lock", timeout=LOCK_TIMEOUT_S):
            if not final.is_dir():
                _publish(final, fill)
                if request is not None:
                    _note(top, request, digest)
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


def find_built(request: str) -> Path | None:
    """What was made last for a request, by whatever compiler; None if nothing was.

    A cache can be copied, or shipped, to a machine without compilers, and be read-only there.
    """
    top = settings.get().cache_dir
    try:
        digest = _index(top, request).read_text(encoding="ascii").strip()
    except OSError:
        return None
    found = _directory(top, digest)
    return found if found.is_dir() else None


def _note(top: Path, request: str, digest: str) -> None:
    """Remember what was made for a request; a reader sees the old note or the new one."""
    path = _index(top, request)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{uuid.uuid4().hex}")
    written.write_text(digest + "\n", encoding="ascii")
    written.rename(path)


def _directory(top: Path, digest: str) -> Path:
    return top / "kernels" / digest[:2] / digest


def _index(top: Path, request: str) -> Path:
    return top / "requests" / request[:2] / request


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
