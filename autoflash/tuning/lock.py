"""Lock: one tuning run at a time on a device, for two would disturb each other's times."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from autoflash.device import Device
from autoflash.errors import CacheError

WAIT_S = 10.0
"""Long enough for a run that is just ending; a longer wait would look like a hang."""


@contextmanager
def device_lock(
    device: Device, visible: str | None, root: Path, *, wait_s: float = WAIT_S
) -> Iterator[None]:
    """Hold the device for this process; the operating system frees it if the process dies.

    Args:
        device: to be held.
        visible: which one, of several that are alike (CUDA_VISIBLE_DEVICES).
        root: the cache directory.
        wait_s: how long to wait for another process.

    Raises:
        CacheError: another process holds it; the message says which. Or the lock of another user
            cannot be opened.
    """
    directory = root / "locks"
    which = f"-{visible}" if visible else ""
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"tune-{device.slug}{which}")
    path = directory / f"{name}.lock"
    owner = directory / f"{name}.pid"
    lock = FileLock(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_s)
    except Timeout:
        pid = "unknown"
        with contextlib.suppress(OSError):
            pid = owner.read_text().strip()
        raise CacheError(
            f"{device.name} is being tuned by another process (pid {pid}); waited {wait_s:.0f} s "
            f"for {path}. Wait for it or end it: the lock goes with its process."
        ) from None
    except OSError as error:
        raise CacheError(
            f"{device.name} cannot be locked for tuning: {error}. Locks lie in the cache "
            "directory; set AUTOFLASH_CACHE_DIR to one in which nobody else made them."
        ) from error
    try:
        owner.write_text(f"{os.getpid()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        lock.release()
