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
from typing import NoReturn

from autoflash.tuning.process import kill_sessions

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


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with contextlib.suppress(OSError, ValueError):  # some sandboxes know no such limit
        resource.setrlimit(kind, (value, hard))


def enter(role: str) -> None:
    """Go on in a child of this process, which stays behind and watches.

    The tuner's end of the pipe closes however the tuner ends, and whoever watches then kills the
    worker and all that it started. A thread could not: a launch or a compiler that hangs may hold
    the interpreter. When the worker dies its watcher clears up after it, and ends as it ended.

    Args:
        role: "compile" or "device".
    """
    watcher = os.getpid()
    if sys.platform == "linux":
        # What a compiler sends into the background stays below this process, where it is found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker:
        _watch(worker)
    if role == "device" and sys.platform == "linux":
        # At the watcher's own death. It starts no others, which this signal would leave behind.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != watcher:
            os._exit(1)


def _watch(worker: int) -> NoReturn:
    """Wait for the end of the worker or of the tuner, whichever is first, and end with it."""
    # The tuner knows a worker for dead by the end of its answers: no copy of that pipe here.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    poll = select.poll()
    poll.register(0, 0)  # POLLHUP alone, which needs no asking
    poll.register(ended, select.POLLIN)
    status = None
    while status is None:
        with contextlib.suppress(ChildProcessError):
            # Before the poll: the worker may have ended before the signal was asked for.
            found, code = os.waitpid(worker, os.WNOHANG)
            if found:
                status = code
                break
        for file, _ in poll.poll():
            if file == 0:
                status = 1 << 8
            else:
                os.read(ended, 1 << 10)
    kill_sessions([os.getpid()], spare=os.getpid())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))
