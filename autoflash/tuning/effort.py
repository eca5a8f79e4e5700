"""Effort: how much a tuning run may try and how carefully it measures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from autoflash.device import Device
from autoflash.errors import UnknownName


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The budget of a search, all per problem.

    Attributes:
        name: what `--effort` takes.
        trials: most configs tried, those already stored included.
        seconds: time for search and finals together; what a problem leaves goes to the next.
            None is no limit.
        timing_ms: time spent in full timing of one config, at least.
        finalists: configs timed again beside the default and PyTorch.
        rounds: interleaved rounds of the finals. Five are the fewest that can prove anything of
            one finalist, six of up to three, nine of up to 25.
        finals_ms: time spent on each finalist, at least.
        asked_s: like seconds, where a run as a whole has less time than that; None where not.
        turn_ms: on a GPU, time of each of its turns, at least. A board at its power limit lowers
            its clocks, and which kernel is fastest changes with that (docs/hopper-forward.md);
            turns of 0.2 s show it, those of 14 ms did not.
        compiles: for a device that is absent: most configs compiled, the promising ones first.
        compile_seconds: likewise, time for compiling. None is no limit.
        compile_timeout_s: after which one compilation is killed.
        evaluate_timeout_s: after which a candidate that has not finished is killed; slow
            problems get more (tuning.evaluate.timeout_s).
    """

    name: str
    trials: int
    seconds: float | None
    timing_ms: float
    finalists: int
    rounds: int
    finals_ms: float
    compiles: int
    compile_seconds: float | None
    compile_timeout_s: float = 120.0
    evaluate_timeout_s: float = 60.0
    turn_ms: float = 0.0
    asked_s: float | None = None

    @property
    def finals_s(self) -> float | None:
        """Most time of a problem's finals where calls are long, half of what it has."""
        limits = [limit for limit in (self.seconds, self.asked_s) if limit is not None]
        return 0.5 * min(limits) if limits else None

    def within(self, seconds: float | None) -> Effort:
        """The same with finals that take no more than half of a problem's time.

        Args:
            seconds: for search and finals of one problem, on average; None is no limit but the
                effort's.
        """
        if seconds is None or (self.seconds is not None and self.seconds <= seconds):
            return self
        entries = self.finalists + 2  # the default and PyTorch
        most_ms = 0.4e3 * seconds / (self.rounds * entries)
        return dataclasses.replace(self, asked_s=seconds, turn_ms=min(self.turn_ms, most_ms))

    def finalist_ms(self, device: Device) -> float:
        """Time spent on each finalist, at least, on a device of that kind."""
        return max(self.finals_ms, self.rounds * self.turn_ms if device.is_cuda else 0.0)


# quick: 12 problems in less than two minutes on two cores with C++ compilations of 2-4 s.
# compile_seconds of quick and normal: 4 problems in less than three minutes on two cores.
EFFORTS = {
    effort.name: effort
    for effort in (
        Effort(name="quick", trials=24, seconds=8.0, timing_ms=30.0, finalists=2, rounds=6,
               finals_ms=60.0, compiles=24, compile_seconds=12.0),
        Effort(name="normal", trials=150, seconds=120.0, timing_ms=50.0, finalists=4, rounds=9,
               finals_ms=150.0, turn_ms=200.0, compiles=400, compile_seconds=36.0),
        Effort(name="full", trials=2000, seconds=None, timing_ms=100.0, finalists=8, rounds=15,
               finals_ms=400.0, turn_ms=200.0, compiles=100_000, compile_seconds=None,
               compile_timeout_s=300.0),
    )
}  # fmt: skip


def of(effort: str | Effort) -> Effort:
    """The effort of that name; an Effort is returned as it is.

    Raises:
        UnknownName: there is no effort of that name.
    """
    if isinstance(effort, Effort):
        return effort
    if effort not in EFFORTS:
        raise UnknownName.of("effort", effort, EFFORTS)
    return EFFORTS[effort]
