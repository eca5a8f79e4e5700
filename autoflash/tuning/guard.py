"""Guard: what a worker may not do to the machine, and who ends it when the tuner is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
from pathlib import Path

LEAST_MEMORY_BYTES = 4 << 30
"""PyTorch, the stacks of its threads and a compiler's heap have room in this."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")


def memory_limit(available_bytes: int | None) -> int | None:
    """How much a worker may take of the memory that is free when a run starts; None: unknown.

    A candidate that allocates without end then fails by itself, before the machine swaps.
    """
    if available_bytes is None:
        return None
    return max(LEAST_MEMORY_BYTES, int(0.8 * available_bytes))


def set_limits(memory_bytes: int | None) -> None:
    """Limits of this process and of all that it starts.

    Args:
        memory_bytes: of private memory, for each process. None for a worker on a GPU, whose driver
            reserves far more addresses than it uses.
    """
    # A core file of a process with PyTorch in it has gigabytes, and every crash would write one.
    _lower(resource.RLIMIT_CORE, 0)
    if memory_bytes is not None:
        _lower(resource.RLIMIT_DATA, memory_bytes)
    if sys.platform == "linux":
        # If memory runs out all the same, the kernel ends a worker, never the tuner.
        with contextlib.suppress(OSError):
            _OOM_SCORE_ADJ.write_text("1000", encoding="ascii")
        # What a compiler sends into the background stays below this process, where it is found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, hard))


def die_with_parent(role: str, requests: int) -> None:
    """End this process, and all it started, when the tuner is gone, however it went.

    The tuner's end of the pipe closes even if it was killed. A child of this process waits for
    that: a thread could not, where a compiler or a launch that hangs holds the interpreter. A
    signal at the parent's death would come first and leave the compilers that ninja started; only
    the device worker, which starts none, asks for one besides.

    Args:
        role: "compile" or "device".
        requests: the read end of the tuner's pipe.
    """
    if role == "device" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    worker = os.getpid()
    if os.fork():
        return
    try:
        _watch(worker, requests)
    finally:
        os._exit(0)


def _watch(worker: int, requests: int) -> None:
    """In the child: wait for the tuner's end, then kill the worker's session."""
    from autoflash.tuning.process import family

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The tuner knows a worker for dead by the end of its answers: no copy of that pipe here.
    null = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(null, file)
    os.closerange(3, requests)
    os.closerange(requests + 1, 256)
    poll = select.poll()
    poll.register(requests, 0)  # POLLHUP alone, which needs no asking
    poll.poll()
    for _ in range(2):  # a process may fork between the look and the kill
        for pid in family(worker):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
