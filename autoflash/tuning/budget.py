"""Budget: how the time of a run is divided between its problems."""

from __future__ import annotations

import math
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
    ) -> None:
        """Plan the time.

        Args:
            problems: in their order.
            device: gives the cost of a call.
            per_problem: seconds, on average; None is no limit.
            in_all: seconds for all together, in place of per_problem times their number.
            running: whether configs are run; if they are only compiled all problems weigh alike.
        """
        self._hard = in_all is not None
        if in_all is not None:
            self._seconds = in_all
        else:
            self._seconds = math.inf if per_problem is None else per_problem * len(problems)
        fair = self._seconds / len(problems) if math.isfinite(self._seconds) else 1.0
        costs = [_CALLS * call_s(p, device) if running else 0.0 for p in problems]
        self._weights = [fair / 2 + cost for cost in costs]
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
            index: its place; those before it are finished.
        """
        if math.isinf(self._end):
            return math.inf
        now = time.monotonic()
        left = max(0.0, self._end - now)
        return now + left * self._weights[index] / sum(self._weights[index:])


def call_s(problem: Problem, device: Device) -> float:
    """One call at half of the peak, in seconds."""
    peak_flops = max(device.tflops_peak(problem.dtype), 0.01) * 1e12
    return problem.flops / (0.5 * peak_flops)
