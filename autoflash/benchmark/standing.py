"""How does autoflash stand against each peer, and against the best one of each problem?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autoflash.benchmark.report import OURS, Report, Row

REPEATED = ("math", "naive", "sdpa")
"""Peers that on a GPU say nothing about the state of the art, or repeat another one."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster autoflash was than a peer on one problem.

    Attributes:
        problem: Problem.name.
        peer: the other one.
        ratio: from paired rounds; from medians where the peer was too slow to take part in them.
        low: lower end of its interval; None where there is none.
        high: upper end.
    """

    problem: str
    peer: str
    ratio: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Standing:
    """Ratios over a set of problems.

    Attributes:
        count: problems.
        mean: geometric.
        worst: the smallest.
    """

    count: int
    mean: float
    worst: Ratio


def rivals(report: Report) -> list[str]:
    """The peers that a report is judged by, in its order: all on a CPU, else not REPEATED."""
    ran = dict.fromkeys(row.provider for row in report.rows if row.latency_us is not None)
    left_out = (OURS, *(REPEATED if report.device.is_cuda else ()))
    return [name for name in ran if name not in left_out]


def ratios(report: Report, peer: str) -> list[Ratio]:
    """Against one peer, on every problem where both ran."""
    rows = {(row.problem, row.provider): row for row in report.rows}
    return [
        _ratio(ours, theirs)
        for problem in dict.fromkeys(row.problem for row in report.rows)
        if (ours := rows.get((problem, OURS))) and (theirs := rows.get((problem, peer)))
        if ours.latency_us and theirs.latency_us
    ]


def best_ratios(report: Report, peers: Sequence[str]) -> dict[str, Ratio]:
    """Problem -> against that peer which had the smallest median there."""
    times = report.latencies()
    found = {(one.problem, one.peer): one for peer in peers for one in ratios(report, peer)}
    best = {
        problem: min((taken[peer], peer) for peer in peers if peer in taken)[1]
        for problem, taken in times.items()
        if OURS in taken and taken.keys() & set(peers)
    }
    return {problem: found[problem, peer] for problem, peer in best.items()}


def standing(of: Sequence[Ratio]) -> Standing:
    """Summary of at least one ratio."""
    mean = statistics.geometric_mean(one.ratio for one in of)
    return Standing(len(of), mean, min(of, key=lambda one: one.ratio))


def _ratio(ours: Row, theirs: Row) -> Ratio:
    assert ours.latency_us
    assert theirs.latency_us
    ratio = theirs.speedup or theirs.latency_us / ours.latency_us
    return Ratio(ours.problem, theirs.provider, ratio, theirs.speedup_low, theirs.speedup_high)
