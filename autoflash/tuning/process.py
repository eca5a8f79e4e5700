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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoflash import settings
from autoflash.errors import WorkerError
from autoflash.tuning import wire

START_S = 120.0
"""Added to the first deadline of a process: importing torch from a cold disk takes minutes."""
STDERR_TAIL_BYTES = 4096
_STDERR_LIMIT_BYTES = 4 << 20
_DYING_S = 20.0


class Process:
    """A worker process: at most one request at a time, started when the first one comes.

    After a timeout or a death the next request starts a new process.

    Attributes:
        role: what the worker is for ("compile", "device").
        busy: whether a request is out.
        deadline: time.monotonic() after which the request is given up.
        starts: how many processes have been started so far.
    """

    def __init__(self, role: str, environment: Mapping[str, str]) -> None:
        self.role = role
        self.busy = False
        self.deadline = 0.0
        self.starts = 0
        self._environment = dict(environment)
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
        if self._process is None or self._process.poll() is not None:
            self._start()
            timeout_s += START_S
        self._unsent = memoryview(wire.pack(request))
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
        self._send()
        closed = self._receive()
        try:
            found = wire.unpack(self._received)
        except ValueError as error:
            reason = f"the worker's answer cannot be read: {error}"
            return self._ended("crash", reason)
        if found is not None:
            self.busy = False
            self._bound_stderr()
            reply = found[0]
            if reply.get("exiting"):
                self.kill()
            return reply
        if closed:
            return self._ended("crash", self._cause_of_death())
        if time.monotonic() > self.deadline:
            return self._ended("timeout", f"no answer in {self._timeout_s:.0f} s")
        return None

    def descriptors(self) -> tuple[int, int | None]:
        """What to wait for: one to read, and one to write while a request is not yet sent."""
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        unsent = self._process.stdin.fileno() if len(self._unsent) else None
        return self._process.stdout.fileno(), unsent

    def kill(self) -> None:
        """End the process and all that it started, now."""
        self.busy = False
        self._unsent = memoryview(b"")
        process, self._process = self._process, None
        if process is None:
            return
        kill_session(process.pid)
        # A driver that is stuck keeps even a killed process: then leave it, and go on.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_DYING_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def close(self) -> None:
        """Kill, and free the files."""
        self.kill()
        self._stderr.close()

    def _start(self) -> None:
        self.kill()
        os.ftruncate(self._stderr.fileno(), 0)
        # A session of its own: Ctrl-C in the terminal reaches the tuner alone, and what the worker
        # starts can be found again (ninja puts every compiler into a process group of its own).
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "autoflash.tuning.worker", self.role],
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
        while True:
            try:
                arrived = os.read(self._process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return False
            if not arrived:
                return True
            self._received += arrived

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
        if os.fstat(self._stderr.fileno()).st_size > _STDERR_LIMIT_BYTES:
            os.ftruncate(self._stderr.fileno(), 0)


def kill_session(session: int) -> None:
    """SIGKILL every process of a session, whatever group it has put itself into."""
    # Twice: a process may fork between the look and the kill.
    for _ in range(2):
        for pid in session_members(session):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def session_members(session: int) -> list[int]:
    """The processes of a session but zombies; the leader alone where there is no /proc."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        return [session]
    members = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # After the name, which may hold anything: state, ppid, pgrp, session.
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.name))
    return members


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
