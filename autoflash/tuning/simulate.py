"""Simulate: how good is each way to search, over recorded tables and many seeds?"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoflash.tuning.plan import COMPILE_S
from autoflash.tuning.replay import Trace, replay
from autoflash.tuning.strategy import STRATEGIES, Strategy
from autoflash.tuning.table import Table

TRIALS = (5, 10, 20, 40, 80)
SHARES = (0.05, 0.1, 0.2, 0.5)
"""Simulated wall time at which searches are compared, of that of the exhaustive sweep."""
NEAR = 0.01
"""Within this of the table's best a search has arrived: a rerun moves by about as much."""

_DO_BENCH_S = 0.125  # triton.testing.do_bench by default: 25 ms of warm-up, 100 ms of timing
_DO_BENCH_CALLS = 7  # that it makes at least: one, five to estimate, one of each kind


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and worst of several."""

    median: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; infinite ones count."""
        return cls(statistics.median_high(values), max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One strategy, over all tables and seeds.

    Attributes:
        strategy: its name.
        by_trials: number of trials -> regret of the best so far (0.01: 1 % slower than the best).
        by_share: share of the sweep's wall time -> likewise.
        trials_to_near: trials until the best so far is within NEAR of the table's best.
        seconds_to_near: simulated seconds until then.
        share_to_near: the same, of the sweep's wall time.
        replays: tables times seeds.
    """

    strategy: str
    by_trials: Mapping[int, Spread]
    by_share: Mapping[float, Spread]
    trials_to_near: Spread
    seconds_to_near: Spread
    share_to_near: Spread
    replays: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; what is infinite (nothing worked yet, never arrived) is null."""

        def plain(spread: Spread) -> dict[str, float | None]:
            values = {"median": spread.median, "worst": spread.worst}
            return {name: v if math.isfinite(v) else None for name, v in values.items()}

        return {
            "strategy": self.strategy,
            "replays": self.replays,
            "regret_by_trials": {str(n): plain(s) for n, s in self.by_trials.items()},
            "regret_by_share_of_sweep": {str(n): plain(s) for n, s in self.by_share.items()},
            "trials_to_near": plain(self.trials_to_near),
            "seconds_to_near": plain(self.seconds_to_near),
            "share_of_sweep_to_near": plain(self.share_to_near),
        }


def simulate(
    tables: Sequence[Table],
    strategies: Sequence[str],
    *,
    seeds: int = 10,
    trials: int | None = None,
    jobs: int | None = None,
    on_strategy: Callable[[Strategy], None] | None = None,
) -> list[Standing]:
    """Replay each strategy on each table alone, with each seed from 0.

    Args:
        tables: what to search.
        strategies: names (tuning.strategy).
        seeds: how many.
        trials: most of each search; None: those of effort normal.
        jobs: compilations at once; None: as each table was recorded.
        on_strategy: called before each.
    """
    standings = []
    for name in strategies:
        strategy = STRATEGIES[name]
        if on_strategy is not None:
            on_strategy(strategy)
        traces = [
            trace
            for table in tables
            for seed in range(seeds if strategy.varies else 1)
            for trace in replay([table], strategy, seed=seed, trials=trials, jobs=jobs)
        ]
        standings.append(standing(name, traces, jobs, trials))
    return standings


def standing(
    name: str, traces: Sequence[Trace], jobs: int | None = None, trials: int | None = None
) -> Standing:
    """Regrets of the traces of one strategy, up to the number of trials that they had."""
    counts = (
        TRIALS if trials is None else (*(n for n in TRIALS if n < trials), trials)[: len(TRIALS)]
    )
    sweeps = [sweep_s(trace.table, jobs) for trace in traces]
    arrived = [trace.reached(NEAR) for trace in traces]
    return Standing(
        strategy=name,
        by_trials={n: Spread.of([trace.regret(trials=n) for trace in traces]) for n in counts},
        by_share={
            share: Spread.of([
                trace.regret(seconds=share * sweep)
                for trace, sweep in zip(traces, sweeps, strict=True)
            ])
            for share in SHARES
        },
        trials_to_near=Spread.of([trials for trials, _ in arrived]),
        seconds_to_near=Spread.of([seconds for _, seconds in arrived]),
        share_to_near=Spread.of([
            seconds / sweep for (_, seconds), sweep in zip(arrived, sweeps, strict=True)
        ]),
        replays=len(traces),
    )  # fmt: skip


def sweep_s(table: Table, jobs: int | None = None) -> float:
    """Wall time of the exhaustive sweep of a table with `triton.testing.do_bench`.

    Each kernel is compiled, `jobs` at once in the order of the table, and timed as soon as it is
    there and the device free; nothing is checked. `triton.autotune` itself compiles one after the
    other (`serial_sweep_s`).
    """
    free = [0.0] * (jobs or table.header.jobs)
    device = 0.0
    for compile_s, bench_s in _costs(table):
        built = heapq.heappop(free) + compile_s
        heapq.heappush(free, built)
        device = max(device, built) + bench_s
    return device


def serial_sweep_s(table: Table, alone: float = 1.0) -> float:
    """The same as `triton.autotune` does it, one kernel after the other.

    Args:
        table: of what.
        alone: factor of the seconds of compilations, during which others ran when recorded.
    """
    return sum(alone * compile_s + bench_s for compile_s, bench_s in _costs(table))


def _costs(table: Table) -> list[tuple[float, float]]:
    """Seconds to compile and to time each kernel; twins of one source are one kernel."""
    usual_s = table.median("compile_s")
    benched = [row.do_bench[1] for row in table.rows.values() if row.do_bench]
    costs: dict[str, tuple[float, float]] = {}
    for config, row in table.rows.items():
        language = table.header.spaces[config.template].language
        compile_s = row.compile_s or usual_s or COMPILE_S[language]
        bench_s = 0.0
        if row.rungs:
            # do_bench takes as long for every kernel that can be called often in that time.
            usual = statistics.median(benched) if benched else _DO_BENCH_S
            least = _DO_BENCH_CALLS * row.rungs[-1].latency_us / 1e6
            bench_s = row.do_bench[1] if row.do_bench else max(usual, least)
        costs.setdefault(row.source or config.key, (compile_s, bench_s))
    return list(costs.values())
