"""Compilers: one pool of compile processes that serves the trials on several devices."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from autoflash.tuning.pool import Finished, Workers

TICK_S = 0.05
"""Longest that a thread waits before it looks for what other threads brought."""


class Compilers:
    """Shares compile processes fairly among lanes; a source that several want is compiled once.

    One thread calls `serve` over and over; the lanes call the rest from theirs.
    """

    def __init__(self, workers: Workers, jobs: int, answers: dict[str, dict[str, Any]]) -> None:
        """Serve nobody yet.

        Args:
            workers: of which role "compile" is used.
            jobs: compilations at once.
            answers: key -> reply, of what has been compiled; grows.
        """
        self._workers = workers
        self._jobs = jobs
        self._answers = answers
        self._lock = threading.Lock()
        self._waiting: dict[Lane, deque[tuple[str, Mapping[str, Any], float]]] = {}
        self._wanted: dict[str, list[Lane]] = {}
        self._out: dict[str, Lane] = {}  # key -> for whom it was sent

    def ask(self, lane: Lane, key: str, request: Mapping[str, Any], timeout_s: float) -> None:
        """Have a source compiled; the lane receives the answer."""
        with self._lock:
            answer = self._answers.get(key)
            if answer is None:
                known = key in self._wanted or key in self._out
                self._wanted.setdefault(key, []).append(lane)
                if not known:
                    self._waiting.setdefault(lane, deque()).append((key, request, timeout_s))
                return
        lane.receive(Finished("compile", key, answer, 0.0))

    def forget(self, lane: Lane) -> None:
        """Compile no more for a lane.

        What is under way goes on: another lane may want it, and its result is kept. The search
        asks for nothing that it does not expect to end in its time.
        """
        with self._lock:
            for key in [key for key, lanes in self._wanted.items() if lane in lanes]:
                self._wanted[key].remove(lane)
                if not self._wanted[key]:
                    del self._wanted[key]
            for job in self._waiting.pop(lane, ()):
                if others := self._wanted.get(job[0]):
                    self._waiting.setdefault(others[0], deque()).append(job)

    def serve(self, timeout_s: float) -> bool:
        """Send what waits and hand out what is done; whether anything is being compiled."""
        self._send()
        if not self._out:
            return False
        for finished in self._workers.wait(timeout_s):
            with self._lock:
                del self._out[finished.key]
                self._answers[finished.key] = finished.reply
                lanes = self._wanted.pop(finished.key, [])
            for lane in lanes:
                lane.receive(finished)
        self._send()
        return True

    def close(self) -> None:
        """End every compiler."""
        self._workers.close()

    def _send(self) -> None:
        with self._lock:
            while len(self._out) < self._jobs:
                waiting = [lane for lane, jobs in self._waiting.items() if jobs]
                if not waiting:
                    return
                # A lane that begins a problem gets the next free compiler, not the last in line.
                served = list(self._out.values())
                lane = min(waiting, key=served.count)
                key, request, timeout_s = self._waiting[lane].popleft()
                self._out[key] = lane
                self._workers.submit("compile", key, request, timeout_s)


class Lane:
    """The Workers of one device: a process of its own that runs candidates, and shared compilers.

    Used by one thread. Where the run is to stop, it raises KeyboardInterrupt there, as Ctrl-C does
    in the main thread.
    """

    def __init__(self, runner: Workers, compilers: Compilers, stopped: threading.Event) -> None:
        """Prepare a lane.

        Args:
            runner: of which role "device" is used.
            compilers: shared with others.
            stopped: set when the run is to end at once.
        """
        self._runner = runner
        self._compilers = compilers
        self._stopped = stopped
        self._compiling: set[str] = set()
        self._mail: queue.SimpleQueue[Finished] = queue.SimpleQueue()

    def submit(self, role: str, key: str, request: Mapping[str, Any], timeout_s: float) -> None:
        """Queue a request for a worker of that role."""
        self._go_on()
        if role == "compile":
            self._compiling.add(key)
            self._compilers.ask(self, key, request, timeout_s)
        else:
            self._runner.submit(role, key, request, timeout_s)

    def pending(self, role: str) -> int:
        """Requests of a role that are queued or out."""
        return len(self._compiling) if role == "compile" else self._runner.pending(role)

    def wait(self, timeout_s: float) -> list[Finished]:
        """What has been answered, waiting at most so long for the first."""
        self._go_on()
        found = self._read(0.0)
        if self._runner.pending("device"):
            # While the device is at work a lane is in no hurry to hear of compilers.
            found += self._runner.wait(0.0 if found else min(timeout_s, 4 * TICK_S))
        elif self._compiling and not found:
            found = self._read(min(timeout_s, 4 * TICK_S))
        return found

    def cancel(self, role: str) -> list[str]:
        """Forget all requests of a role; their keys."""
        if role != "compile":
            return self._runner.cancel(role)
        keys = list(self._compiling)
        self._compilers.forget(self)
        self._compiling.clear()
        return keys

    def close(self) -> None:
        """End the device's process, and want nothing more."""
        self._compilers.forget(self)
        self._compiling.clear()
        self._runner.close()

    def receive(self, finished: Finished) -> None:
        """Take an answer of the compilers; called by any thread."""
        self._mail.put(finished)

    def _read(self, timeout_s: float) -> list[Finished]:
        found = []
        try:
            found.append(
                self._mail.get(timeout=timeout_s) if timeout_s else self._mail.get_nowait()
            )
            while True:
                found.append(self._mail.get_nowait())
        except queue.Empty:
            # What was forgotten may still have arrived.
            wanted = [each for each in found if each.key in self._compiling]
        self._compiling -= {each.key for each in wanted}
        return wanted

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise KeyboardInterrupt
