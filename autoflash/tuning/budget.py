"""Budget: how the time of a run is divided between its problems."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

from autoflash.device import Device
from autoflash.problem import Problem

_CALLS = 40  # about as many as check, timing of the first configs and finals make at least


class Budget:
    """Divides time among problems; what one leaves goes to those behind it.

    Half of it is the same for all, the other half follows what a call costs: on a CPU the longest
    problem of a grid needs more for its finals alone than the shortest for everything.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        device: Device,
        *,
        per_problem: float | None,
        in_all: float | None,
        running: bool,
        devices: int = 1,
    ) -> None:
        """Plan the time.

        Args:
            problems: in their order.
            device: gives the cost of a call.
            per_problem: seconds, on average; None is no limit.
            in_all: seconds for all together, in place of per_problem times their number.
            running: whether configs are run; if they are only compiled all problems weigh alike.
            devices: how many problems are tuned at once.
        """
        self._hard = in_all is not None
        turns = math.ceil(len(problems) / devices)
        self._at_once = len(problems) / turns  # on average: 6 problems on 4 devices take two turns
        if in_all is not None:
            self._seconds = in_all
        else:
            self._seconds = math.inf if per_problem is None else per_problem * turns
        fair = self._seconds / turns if math.isfinite(self._seconds) else 1.0
        costs = [_CALLS * call_s(p, device) if running else 0.0 for p in problems]
        self._weights = [fair / 2 + cost for cost in costs]
        self._waiting = set(range(len(problems)))
        self._under_way: dict[int, float] = {}  # index -> its deadline
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """The time counts from now."""
        self._end = time.monotonic() + self._seconds

    def is_spent(self) -> bool:
        """Whether a limit for the whole run is used up."""
        return self._hard and time.monotonic() >= self._end

    def deadline(self, index: int) -> float:
        """time.monotonic() at which the problem that starts now should be finished.

        Args:
            index: its place.
        """
        if math.isinf(self._end):
            return math.inf
        with self._lock:
            now = time.monotonic()
            left = max(0.0, self._end - now)
            self._under_way.pop(index, None)  # another device had it, and failed
            taken = sum(max(0.0, end - now) for end in self._under_way.values())
            share = self._weights[index] / sum(
                self._weights[other] for other in self._waiting | {index}
            )
            self._waiting.discard(index)
            end = now + min(left, max(0.0, self._at_once * left - taken) * share)
            self._under_way[index] = end
            return end

    def finish(self, index: int) -> None:
        """The problem of that place is finished, or skipped."""
        with self._lock:
            self._waiting.discard(index)
            self._under_way.pop(index, None)


def call_s(problem: Problem, device: Device) -> float:
    """One call at half of the peak, in seconds."""
    peak_flops = max(device.tflops_peak(problem.dtype), 0.01) * 1e12
    return problem.flops / (0.5 * peak_flops)
