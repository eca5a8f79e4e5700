"""How did the search of a problem go: its trials in order, the best so far, who won?"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from autoflash.problem import Problem
from autoflash.record import Record

TIMED = ("ok", "slow", "predicted")
"""Outcomes with a time: measured, measured by few calls, or the static model's."""
NEAR = 1.01
"""A search has arrived when it is within 1 % of the best that it will find."""


@dataclass(frozen=True, slots=True)
class Search:
    """The trials of one problem on one device, under one policy.

    Attributes:
        problem: which.
        count: trials, those that failed included.
        points: (number of the trial from 1, microseconds) of those with a time, in order.
        seconds: from the first of them to the last one, breaks between runs included.
        winner: the stored best record, if any; it need not be among the trials.
    """

    problem: Problem
    count: int
    points: tuple[tuple[int, float], ...]
    seconds: float
    winner: Record | None

    @property
    def steps(self) -> list[tuple[int, float]]:
        """The trials that were faster than all before them."""
        found: list[tuple[int, float]] = []
        for number, us in self.points:
            if not found or us < found[-1][1]:
                found.append((number, us))
        return found

    @property
    def best_us(self) -> float | None:
        """The fastest single trial."""
        return min((us for _, us in self.points), default=None)

    @property
    def arrived(self) -> int | None:
        """Number of the first trial within NEAR of the fastest one."""
        best = self.best_us
        return next((n for n, us in self.points if best and us <= NEAR * best), None)

    def best_after(self, number: int) -> float | None:
        """The best time of the first so many trials."""
        return min((us for n, us in self.points if n <= number), default=None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; the winner has a place of its own."""
        return {
            "problem": self.problem.name,
            "trials": self.count,
            "timed": len(self.points),
            "seconds": self.seconds,
            "best_us": self.best_us,
            "within_1_percent_after": self.arrived,
            "best_so_far": [list(step) for step in self.steps],
            "winner": self.winner.to_dict() if self.winner else None,
        }


def searches(trials: Iterable[Record], winners: Iterable[Record]) -> tuple[Search, ...]:
    """One per problem, in the order in which they were begun; then those with a winner alone."""
    by_problem: dict[Problem, list[Record]] = {}
    for record in trials:
        by_problem.setdefault(record.problem, []).append(record)
    best = {record.problem: record for record in winners}
    problems = dict.fromkeys([*by_problem, *best])
    return tuple(_search(p, by_problem.get(p, []), best.get(p)) for p in problems)


def _search(problem: Problem, records: Sequence[Record], winner: Record | None) -> Search:
    points = tuple(
        (number, record.latency_us)
        for number, record in enumerate(records, 1)
        if record.outcome in TIMED and record.latency_us
    )
    moments = [each for record in records if (each := moment(record.created))]
    seconds = (max(moments) - min(moments)).total_seconds() if moments else 0.0
    return Search(problem, len(records), points, seconds, winner)


def moment(text: str) -> datetime | None:
    """The moment that a record or a run names; None where it names none."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None


def convergence(found: Sequence[Search]) -> Mapping[int, float]:
    """Number of trials -> median over problems of the best so far over the best in the end.

    A problem counts from its first time on; one that ended earlier stays where it ended.
    """
    timed = [search for search in found if search.points]
    numbers = sorted({number for search in timed for number, _ in search.steps})
    medians = {}
    for number in numbers:
        ratios = [
            so_far / best
            for search in timed
            if (so_far := search.best_after(number)) and (best := search.best_us)
        ]
        if ratios:
            medians[number] = statistics.median(ratios)
    return medians
