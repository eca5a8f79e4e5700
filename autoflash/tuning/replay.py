"""Replay: the loop of a search, run on a recorded table with a clock of its own and no hardware.

What runs is the tuner's own `Trials`: its order of proposals, batches, gates and race. Only the
workers are pretended: they answer from the table, after the seconds that the table says, and the
templates offer the recorded configs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autoflash.codegen.space import Space
from autoflash.codegen.template import Source, Template
from autoflash.config import Config
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.evaluate import race
from autoflash.tuning.plan import COMPILE_S
from autoflash.tuning.pool import Finished
from autoflash.tuning.run import Run
from autoflash.tuning.strategy import STRATEGIES, Strategy
from autoflash.tuning.table import TIMED, Row, Table
from autoflash.tuning.table import Space as Recorded
from autoflash.tuning.trials import Trials

if TYPE_CHECKING:
    from autoflash.database import Database

CHECK_S, LOAD_S = 0.2, 0.02
"""Seconds to check and to load one kernel where a table has no row that says."""
_FEW_S = 0.002  # of a rung beyond its calls, where a table does not say


@dataclass(frozen=True, slots=True)
class Step:
    """One config that has been tried.

    Attributes:
        seconds: on the simulated clock, when its trial ended.
        config: which.
        latency_us: its time by the table where the trial was timed to its end, else None.
    """

    seconds: float
    config: Config
    latency_us: float | None


@dataclass(frozen=True, slots=True)
class Trace:
    """One replayed search of one problem.

    Attributes:
        table: what it ran on.
        strategy: its name.
        seed: of the search.
        steps: in the order in which trials ended.
        outcomes: outcome -> trials.
    """

    table: Table
    strategy: str
    seed: int
    steps: tuple[Step, ...]
    outcomes: Counter[str] = field(default_factory=Counter)

    def regret(self, *, trials: float = math.inf, seconds: float = math.inf) -> float:
        """How much slower the best so far is than the table's best; infinite: nothing worked yet.

        Args:
            trials: only the first so many count.
            seconds: only what had ended by then counts.
        """
        best_us = self.table.best.latency_us or math.inf
        found = [
            step.latency_us
            for number, step in enumerate(self.steps)
            if number < trials and step.seconds <= seconds and step.latency_us is not None
        ]
        return min(found, default=math.inf) / best_us - 1

    def reached(self, regret: float) -> tuple[float, float]:
        """Trials and seconds until the best so far was within `regret`; infinite: never."""
        limit_us = (1 + regret) * (self.table.best.latency_us or 0.0)
        for number, step in enumerate(self.steps, 1):
            if step.latency_us is not None and step.latency_us <= limit_us:
                return number, step.seconds
        return math.inf, math.inf


def replay(
    tables: Sequence[Table],
    strategy: Strategy | str = "default",
    *,
    seed: int = 0,
    trials: int | None = None,
    seconds: float | None = None,
    jobs: int | None = None,
) -> list[Trace]:
    """Search each table, one after the other, as one run of `tune` would.

    Kernels that problems share are compiled once, and winners seed the searches behind them.

    Args:
        tables: of one device.
        strategy: what to search by, or its name.
        seed: of the search.
        trials: per problem; None: those of effort normal.
        seconds: per problem, simulated; None is no limit.
        jobs: compilations at once; None: as the table was recorded.
    """
    if isinstance(strategy, str):
        strategy = STRATEGIES[strategy]
    traces: list[Trace] = []
    memory = _Memory()
    workers: _Recorded | None = None
    compiled: dict[str, dict[str, Any]] = {}
    for table in tables:
        workers = _Recorded(table, jobs or table.header.jobs, strategy.races)
        effort = EFFORTS["normal"]
        run = Run(
            device=table.header.device,
            templates={name: _template(table, name) for name in table.header.spaces},
            database=cast("Database", memory),
            effort=effort,
            policy=table.header.policy,
            workers=workers,
            seed=seed,
            jobs=jobs or table.header.jobs,
            strategy=strategy,
            compiled=compiled,
        )
        traces.append(_search(run, table, workers, strategy, trials or effort.trials, seconds))
        memory.set_best(traces[-1], run)
    return traces


def _search(
    run: Run,
    table: Table,
    workers: _Recorded,
    strategy: Strategy,
    limit: int,
    seconds: float | None,
) -> Trace:
    steps: list[Step] = []

    def note(record: Record | None, message: str) -> None:
        if record is not None:
            timed = record.latency_us if record.is_measured else None
            steps.append(Step(workers.clock, record.config, timed))

    trials = Trials(run, table.header.problem, limit=limit, report=note)
    most = math.inf if seconds is None else seconds
    trials.search(lambda: most - workers.clock)
    return Trace(table, strategy.name, run.seed, tuple(steps), trials.outcomes)


class _Recorded:
    """Workers that answer from a table: `jobs` compilers and one device, on a simulated clock."""

    def __init__(self, table: Table, jobs: int, races: bool) -> None:
        self.clock = 0.0
        self._rows = {_source(row, table).digest: row for row in table.rows.values()}
        self._table, self._races = table, races
        self._free = {"compile": [0.0] * jobs, "device": [0.0]}  # when each worker is
        self._order = itertools.count()
        self._out: list[tuple[float, int, str, str, dict[str, Any], float]] = []
        self._load_s = table.median("load_s") or LOAD_S
        self._check_s = table.median("check_s") or CHECK_S

    def submit(self, role: str, key: str, request: Mapping[str, Any], timeout_s: float) -> None:
        if request["kind"] == "hello":  # to the process that follows one that was lost
            self._answer(role, key, {"outcome": "ok", "environment": {}}, 0.0)
            return
        row = self._rows[key]
        reply, seconds = self._compile(row) if role == "compile" else self._evaluate(row, request)
        self._answer(role, key, reply, seconds)

    def _answer(self, role: str, key: str, reply: dict[str, Any], seconds: float) -> None:
        start = max(self.clock, heapq.heappop(self._free[role]))
        heapq.heappush(self._free[role], start + seconds)
        answer = (start + seconds, next(self._order), role, key, reply, seconds)
        heapq.heappush(self._out, answer)

    def pending(self, role: str) -> int:
        return sum(answer[2] == role for answer in self._out)

    def wait(self, timeout_s: float) -> list[Finished]:
        if not self._out:
            return []
        self.clock, _, role, key, reply, seconds = heapq.heappop(self._out)
        return [Finished(role, key, reply, seconds)]

    def cancel(self, role: str) -> list[str]:
        keys = [answer[3] for answer in self._out if answer[2] == role]
        self._out = [answer for answer in self._out if answer[2] != role]
        heapq.heapify(self._out)
        self._free[role] = [min(free, self.clock) for free in self._free[role]]
        return keys

    def close(self) -> None:
        self._out.clear()

    def _compile(self, row: Row) -> tuple[dict[str, Any], float]:
        language = self._table.header.spaces[row.config.template].language
        seconds = row.compile_s or self._table.median("compile_s") or COMPILE_S[language]
        if row.outcome == "compile_error":
            return {"outcome": "compile_error", "reason": "as recorded"}, seconds
        return {"outcome": "ok", "resources": dict(row.resources)}, seconds

    def _evaluate(self, row: Row, request: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        seconds = (row.load_s or self._load_s) + (row.check_s or self._check_s)
        if row.outcome not in TIMED:
            return {"outcome": row.outcome, "reason": "as recorded"}, seconds
        timer = _RecordedTimer(row)
        best_us = request["best_us"] if self._races else None
        outcome, reason, measured = race(timer, _no_call, self._table.header.timing_ms, best_us)
        reply = {"outcome": outcome, "reason": reason, "measurement": measured.to_dict()}
        return reply, seconds + timer.seconds


class _RecordedTimer:
    """Says what each rung measured; one that was not run says what the longest before it did."""

    def __init__(self, row: Row) -> None:
        self.seconds = 0.0
        self._rungs = row.rungs
        self._number = 0

    def measure(
        self, call: Callable[[], object], *, budget_ms: float = 25.0, min_calls: int = 3
    ) -> Measurement:
        rung = self._rungs[min(self._number, len(self._rungs) - 1)]
        known = self._number < len(self._rungs)
        self._number += 1
        if known and rung.seconds is not None:
            self.seconds += rung.seconds
            return rung.measurement
        count = max(min_calls, int(1000 * budget_ms / rung.latency_us))
        self.seconds += count * rung.latency_us / 1e6 + _FEW_S
        return Measurement(
            latency_us=rung.latency_us, p20_us=rung.p20_us, p80_us=rung.p80_us, count=count
        )


def _no_call() -> None:
    """What the race would call."""


class _RecordedTemplate(Template):
    """A template that offers what a table holds of it; its source is the name of a row."""

    table: Table  # set by _template, since a frozen dataclass takes its own fields only

    def refusal(self, problem: Problem, device: Device) -> str | None:
        return None

    def gives_way(self, problem: Problem, device: Device) -> str | None:
        return "as recorded" if self._space.gives_way else None

    def default_config(self, problem: Problem, device: Device) -> Config:
        return self._space.default

    def seed_configs(self, problem: Problem, device: Device) -> list[Config]:
        return [c for c in (self._space.default, *self._space.seeds) if c in self.table.rows]

    def space(self, problem: Problem, device: Device) -> Space:
        configs = tuple(config for config in self.table.rows if config.template == self.name)
        return Space(self.name, configs, len(configs), Counter())

    def render(self, config: Config, problem: Problem, device: Device) -> Source:
        return _source(self.table.rows[config], self.table)

    @property
    def _space(self) -> Recorded:
        return self.table.header.spaces[self.name]


def _template(table: Table, name: str) -> Template:
    space = table.header.spaces[name]
    template = _RecordedTemplate(
        name=name, path=Path(name), language="recorded", summary="", source="", op="", accepts={},
        yields={}, facts={}, tunables=space.tunables, default=dict(space.default), seeds=(),
        derived={}, constraints={}, options={}, digest=space.digest,
        _environment=cast(Any, None), _file="",
    )  # fmt: skip
    object.__setattr__(template, "table", table)
    return template


def _source(row: Row, table: Table) -> Source:
    text = row.source or f"{table.name} {row.config.key}"
    return Source(row.config.template, "recorded", text, "", "", True, {})


class _Memory:
    """In place of a database: the winners of the run so far."""

    def __init__(self) -> None:
        self._bests: list[Record] = []

    def trials(self, **_: object) -> list[Record]:
        return []

    def bests(self, *, arch: str | None = None, device_key: str | None = None) -> list[Record]:
        return self._bests

    def add(self, record: Record, run: int | None = None) -> None:
        """Nothing: a replay is over when it ends."""

    def set_best(self, trace: Trace, run: Run) -> None:
        timed = [step for step in trace.steps if step.latency_us is not None]
        if timed:
            best = min(timed, key=lambda step: step.latency_us or math.inf)
            self._bests.append(run.record(trace.table.header.problem, best.config, "ok"))
