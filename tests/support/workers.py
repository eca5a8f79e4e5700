"""Workers that are none: what tests of searches have in place of compilers and a device."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from autoflash.tuning.pool import Finished

Reply = Mapping[str, Any]


class FakeWorkers:
    """Answers at once, one request after the other, by the method that has the name of its kind.

    Attributes:
        seen: how many requests of each kind were answered.
        closed: how often it was closed.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.closed = 0
        self._queue: deque[tuple[str, str, Reply]] = deque()

    def submit(self, role: str, key: str, request: Reply, timeout_s: float) -> None:
        assert timeout_s > 0
        self._queue.append((role, key, request))

    def pending(self, role: str) -> int:
        return sum(queued == role for queued, _, _ in self._queue)

    def wait(self, timeout_s: float) -> list[Finished]:
        if not self._queue:
            return []
        role, key, request = self._queue.popleft()
        self.seen[request["kind"]] += 1
        return [Finished(role, key, dict(self.answer(request)), 0.01)]

    def answer(self, request: Reply) -> Reply:
        reply: Reply = getattr(self, request["kind"])(request)
        return reply

    def cancel(self, role: str) -> list[str]:
        keys = [key for queued, key, _ in self._queue if queued == role]
        self._queue = deque(job for job in self._queue if job[0] != role)
        return keys

    def close(self) -> None:
        self._queue.clear()
        self.closed += 1
