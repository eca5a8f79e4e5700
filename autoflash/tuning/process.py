"""Process: the tuner's handle on one worker: start, ask with a deadline, kill, tell why it died."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoflash import settings
from autoflash.errors import WorkerError
from autoflash.tuning import replies, wire

COMMAND = (sys.executable, "-m", "autoflash.tuning.worker")
"""Starts a worker; its role and the memory it may take follow."""
START_S = 120.0
"""Added to the first deadline of a process: importing torch from a cold disk takes minutes."""
STDERR_TAIL_BYTES = 4096
_STDERR_LIMIT_BYTES = 4 << 20
_READ_BYTES = 4 << 20
"""Most taken in at once: a worker that writes without end must not hold up the others."""
_DYING_S = 20.0
_LOOKS = 1000
"""For processes to kill: one takes 1.6 ms where 66 processes run, more where there are more."""


class Process:
    """A worker process: at most one request at a time, started when the first one comes.

    After a timeout or a death the next request starts a new process.

    Attributes:
        role: what the worker is for ("compile", "device").
        busy: whether a request is out.
        deadline: time.monotonic() after which the request is given up.
        starts: how many processes have been started so far.
    """

    def __init__(
        self,
        role: str,
        environment: Mapping[str, str],
        *,
        memory_bytes: int | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.role = role
        self.busy = False
        self.deadline = 0.0
        self.starts = 0
        self._command = [*command, role, str(memory_bytes or 0)]
        self._environment = dict(environment)
        self._request: Mapping[str, Any] = {}
        self._number = 0  # of the request; an answer repeats it
        self._process: subprocess.Popen[bytes] | None = None
        self._received = bytearray()
        self._unsent = memoryview(b"")
        self._timeout_s = 0.0
        self._said_before = 0  # bytes on standard error when the request was sent
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        # The worker shares the file position: it appends, and here os.pread reads.
        fcntl.fcntl(self._stderr, fcntl.F_SETFL, os.O_APPEND)

    @property
    def pid(self) -> int | None:
        """Of the process that is running, if one is."""
        return self._process.pid if self._process else None

    def submit(self, request: Mapping[str, Any], timeout_s: float) -> None:
        """Send a request; the answer comes from `poll`."""
        assert not self.busy
        if not self._is_ready():
            self._start()
            timeout_s += START_S
        self._number += 1
        self._request = request
        self._unsent = memoryview(wire.pack({**request, "id": self._number}))
        self._said_before = os.fstat(self._stderr.fileno()).st_size
        self._received.clear()
        self.busy = True
        self.deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._send()

    def poll(self) -> dict[str, Any] | None:
        """The answer, or what became of the process; None while neither is known.

        Returns:
            The worker's reply, or {"outcome": "timeout" | "crash", "reason": ...}.
        """
        assert self.busy
        assert self._process is not None
        # What it started may hold the pipe open: its own end counts too, and is looked at first,
        # so that nothing it said before is missed.
        dead = self._process.poll() is not None
        self._send()
        closed = self._receive() or dead
        self._bound_stderr()
        try:
            found = wire.unpack(self._received)
        except (ValueError, RecursionError) as error:
            return self._ended("crash", f"the worker's answer cannot be read: {error}")
        if found is not None:
            return self._answered(*found)
        if closed:
            return self._ended("crash", self._cause_of_death())
        if time.monotonic() > self.deadline:
            return self._ended("timeout", f"no answer in {self._timeout_s:.0f} s")
        return None

    def _answered(self, reply: dict[str, Any], size: int) -> dict[str, Any]:
        """An answer that arrived whole, if it is one to the request and can be meant."""
        reason = replies.fault(self._request, reply)
        if reply.pop("id", None) != self._number:
            reason = "the worker answered something that it was not asked"
        elif len(self._received) > size:
            reason = "the worker said more than its answer"
        if reason is not None:
            return self._ended("crash", reason)
        self.busy = False
        if reply.get("exiting"):
            self.kill()
        return reply

    def descriptors(self) -> tuple[int, int | None]:
        """What to wait for: one to read, and one to write while a request is not yet sent."""
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        unsent = self._process.stdin.fileno() if len(self._unsent) else None
        return self._process.stdout.fileno(), unsent

    def kill(self) -> None:
        """End the process and all that it started, now."""
        if self._process is not None:
            kill_sessions([self._process.pid])
        self._reap()

    def _reap(self) -> None:
        """Wait for a process that was killed."""
        self.busy = False
        self._unsent = memoryview(b"")
        process, self._process = self._process, None
        if process is None:
            return
        # A driver that is stuck keeps even a killed process: then leave it, and go on.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_DYING_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def close(self) -> None:
        """Kill, and free the files."""
        close_all([self])

    def _is_ready(self) -> bool:
        """Whether a process waits for a request; one that has spoken unasked is out of step."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._received.clear()
        return not self._receive() and not self._received

    def _start(self) -> None:
        self.kill()
        self._received.clear()
        os.ftruncate(self._stderr.fileno(), 0)
        # A session of its own: Ctrl-C in the terminal reaches the tuner alone, and what the worker
        # starts can be found again (ninja puts every compiler into a process group of its own).
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise WorkerError(f"cannot start a {self.role} worker: {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        self.starts += 1

    def _send(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        while len(self._unsent):
            try:
                sent = os.write(self._process.stdin.fileno(), self._unsent)
            except BlockingIOError:
                return
            except BrokenPipeError:  # its death is seen by _receive
                sent = len(self._unsent)
            self._unsent = self._unsent[sent:]

    def _receive(self) -> bool:
        """Take what has arrived; whether the worker has closed its end."""
        assert self._process is not None
        assert self._process.stdout is not None
        for _ in range(_READ_BYTES >> 16):
            try:
                arrived = os.read(self._process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return False
            if not arrived:
                return True
            self._received += arrived
        return False

    def _ended(self, outcome: str, reason: str) -> dict[str, Any]:
        tail = self.stderr_tail()
        self.kill()
        return {"outcome": outcome, "reason": reason, "stderr": tail}

    def _cause_of_death(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe and did not end"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
            return f"killed by signal {-code}"
        return f"the worker exited with status {code}"

    def stderr_tail(self) -> str:
        """The last that the process wrote to its standard error since the last request."""
        file = self._stderr.fileno()
        start = max(self._said_before, os.fstat(file).st_size - STDERR_TAIL_BYTES)
        return os.pread(file, STDERR_TAIL_BYTES, start).decode(errors="replace").strip()

    def _bound_stderr(self) -> None:
        """Forget what was said, but the end: a kernel that prints without end fills no disk."""
        file = self._stderr.fileno()
        if os.fstat(file).st_size > _STDERR_LIMIT_BYTES:
            tail = self.stderr_tail()
            os.ftruncate(file, 0)
            self._said_before = 0
            with contextlib.suppress(OSError):
                os.write(file, tail.encode())


def close_all(processes: Sequence[Process]) -> None:
    """Kill all of them at once, then wait for each: one that dies slowly holds up no other."""
    kill_sessions([process.pid for process in processes if process.pid is not None])
    for process in processes:
        process._reap()
        process._stderr.close()


def kill_sessions(leaders: Collection[int], *, spare: int | None = None) -> None:
    """SIGKILL every process of these sessions, whatever group it is in, and all below them.

    Args:
        leaders: their processes' ids.
        spare: a process that is left alone: the one that asks.
    """
    # Until a look finds nobody new: a process may fork between the look and its kill, so may what
    # it forked, and on a busy machine that happens. A look takes milliseconds, so that many
    # sessions share it; their number is bounded against what forks faster than that.
    killed: set[int] = set()
    for _ in range(_LOOKS if leaders else 0):
        found = set(family(*leaders)) - killed - {spare}
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        killed |= found


def family(*leaders: int) -> list[int]:
    """The processes of the leaders' sessions and all below, which may have left the sessions."""
    processes = _processes()
    if processes is None:
        return [*leaders]
    found = {pid for pid, (_, session) in processes.items() if session in leaders}
    found |= set(leaders) & processes.keys()
    below = found
    while below:
        below = {pid for pid, (parent, _) in processes.items() if parent in below} - found
        found |= below
    return sorted(found)


def session_members(session: int) -> list[int]:
    """The processes of a session but zombies; the leader alone where there is no /proc."""
    processes = _processes()
    if processes is None:
        return [session]
    return [pid for pid, (_, its) in processes.items() if its == session]


def _processes() -> dict[int, tuple[int, int]] | None:
    """Process -> parent and session, zombies left out; None where there is no /proc."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        return None
    found = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # After the name, which may hold anything: state, ppid, pgrp, session.
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] != "Z":
                found[int(entry.name)] = int(fields[1]), int(fields[3])
    return found


def environment(
    *, cache_dir: Path, visible: str | None, scratch: Path | None = None
) -> dict[str, str]:
    """The environment variables of a worker.

    Args:
        cache_dir: where it finds and stores built kernels.
        visible: CUDA_VISIBLE_DEVICES; None leaves it as it is.
        scratch: where temporary files go; None: where they always do.
    """
    chosen = settings.get()
    package_parent = str(settings.PACKAGE_DIR.parent)
    path = os.environ.get("PYTHONPATH")
    env = {
        **os.environ,
        "AUTOFLASH_CACHE_DIR": str(cache_dir),
        "AUTOFLASH_CXX": chosen.cxx,
        "PYTHONPATH": package_parent + (os.pathsep + path if path else ""),
    }
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    if scratch is not None:
        env["TMPDIR"] = str(scratch)
    return env
