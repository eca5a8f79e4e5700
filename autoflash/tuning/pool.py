"""Pool: the processes of a run, several that compile and one that runs candidates."""

from __future__ import annotations

import select
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autoflash.build.memory import available_bytes
from autoflash.tuning import guard, process
from autoflash.tuning.process import COMMAND, Process


@dataclass(frozen=True, slots=True)
class Finished:
    """One request that has been answered.

    Attributes:
        role: "compile" or "device".
        key: as given to `submit`.
        reply: the worker's answer; "outcome" is always there.
        seconds: from sending the request to the answer, the start of a process included.
    """

    role: str
    key: str
    reply: dict[str, Any]
    seconds: float


class Workers(Protocol):
    """What the search asks for candidates to be compiled and run; tests put a fake here."""

    def submit(self, role: str, key: str, request: Mapping[str, Any], timeout_s: float) -> None:
        """Queue a request for a worker of that role."""

    def pending(self, role: str) -> int:
        """Requests of a role that are queued or out."""

    def wait(self, timeout_s: float) -> list[Finished]:
        """What has been answered, waiting at most so long for the first."""

    def cancel(self, role: str) -> list[str]:
        """Forget all requests of a role, killing those under way; their keys."""

    def close(self) -> None:
        """End every process."""


@dataclass(slots=True)
class _Job:
    key: str
    request: Mapping[str, Any]
    timeout_s: float


class Pool:
    """Workers as child processes, started when they are first needed."""

    def __init__(
        self, *, jobs: int, cache_dir: Path, visible: str | None, command: Sequence[str] = COMMAND
    ) -> None:
        # Compilers that are killed leave their temporary files: here, where `close` finds them.
        self._scratch = Path(tempfile.mkdtemp(prefix="autoflash-tune-"))
        # They see no GPU: they must not hold memory on it, and need none.
        compilers = process.environment(cache_dir=cache_dir, visible="", scratch=self._scratch)
        runner = process.environment(cache_dir=cache_dir, visible=visible, scratch=self._scratch)
        most = guard.memory_limit(available_bytes())
        on_gpu = visible is not None
        self._processes = {
            "compile": [
                Process("compile", compilers, memory_bytes=most, command=command)
                for _ in range(jobs)
            ],
            "device": [
                Process("device", runner, memory_bytes=None if on_gpu else most, command=command)
            ],
        }
        self._queues: dict[str, deque[_Job]] = {role: deque() for role in self._processes}
        self._out: dict[Process, tuple[str, float]] = {}  # key, and when it was sent

    def submit(self, role: str, key: str, request: Mapping[str, Any], timeout_s: float) -> None:
        """Queue a request for a worker of that role."""
        self._queues[role].append(_Job(key, request, timeout_s))
        self._dispatch()

    def pending(self, role: str) -> int:
        """Requests of a role that are queued or out."""
        out = sum(worker.role == role for worker in self._out)
        return len(self._queues[role]) + out

    def wait(self, timeout_s: float) -> list[Finished]:
        """What has been answered, waiting at most so long for the first."""
        limit = time.monotonic() + timeout_s
        while True:
            self._dispatch()
            finished = self._collect()
            now = time.monotonic()
            if finished or not self._out or now >= limit:
                self._dispatch()
                return finished
            poll = select.poll()
            for worker in self._out:
                readable, writable = worker.descriptors()
                poll.register(readable, select.POLLIN)
                if writable is not None:
                    poll.register(writable, select.POLLOUT)
            next_deadline = min(worker.deadline for worker in self._out)
            poll.poll(max(0.0, min(limit, next_deadline) - now) * 1000 + 1)

    def cancel(self, role: str) -> list[str]:
        """Forget all requests of a role, killing those under way; their keys."""
        keys = [job.key for job in self._queues[role]]
        self._queues[role].clear()
        for worker in [worker for worker in self._out if worker.role == role]:
            keys.append(self._out.pop(worker)[0])
            worker.kill()
        return keys

    def close(self) -> None:
        """End every process and remove what they left."""
        process.close_all([worker for workers in self._processes.values() for worker in workers])
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._out.clear()
        for queue in self._queues.values():
            queue.clear()

    def pids(self) -> list[int]:
        """The processes that are running."""
        everyone = (worker for workers in self._processes.values() for worker in workers)
        return [worker.pid for worker in everyone if worker.pid is not None]

    def _dispatch(self) -> None:
        for role, queue in self._queues.items():
            for worker in self._processes[role]:
                if queue and not worker.busy:
                    job = queue.popleft()
                    self._out[worker] = (job.key, time.monotonic())
                    worker.submit(job.request, job.timeout_s)

    def _collect(self) -> list[Finished]:
        finished = []
        for worker in list(self._out):
            reply = worker.poll()
            if reply is not None:
                key, sent = self._out.pop(worker)
                finished.append(Finished(worker.role, key, reply, time.monotonic() - sent))
        return finished
