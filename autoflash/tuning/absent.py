"""Absent: compile a problem's configs for a device that is not here, and rank them by model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from autoflash import errors
from autoflash.build.kernel import Resources
from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.errors import AutoflashError, TemplateError
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.tuning.predict import over_resources, predict
from autoflash.tuning.run import Run, infeasible
from autoflash.tuning.trials import HOPELESS, Report, compile_request, explain


class Predictions:
    """The candidates of one problem on a device that is absent.

    All that are feasible are ranked by the static model as far as it goes without a compiler; the
    promising ones are compiled, best first, as many as the budget allows, and ranked again with the
    registers, shared memory and spills that the compiler reports.

    Attributes:
        problem: which.
        records: config -> its record, those of earlier runs included.
        outcomes: outcome -> how many, with "infeasible" for the points of the spaces.
        fresh: records made by this run.
        feasible: how many candidates there are.
        limit: how many of them may be compiled.
        refusals: template -> why it does not take the problem, or cannot be compiled here.
    """

    def __init__(self, run: Run, problem: Problem, *, limit: int, report: Report) -> None:
        self.problem = problem
        self.records: dict[Config, Record] = {}
        self.outcomes: Counter[str] = Counter()
        self.fresh = 0
        self._run = run
        self._report = report
        templates = run.accepting(problem)
        self.refusals = run.refusals(problem)
        spaces = [template.space(problem, run.device) for template in templates]
        if rejected := infeasible(spaces):
            self.outcomes["infeasible"] = rejected
        feasible = [config for space in spaces for config in space.configs]
        self.feasible = len(feasible)
        self.limit = min(limit, len(feasible))
        estimates = {config: self._predict(config, None) for config in feasible}
        seeds = [c for c in run.seeds(problem, templates) if c in estimates]
        ranked = sorted(feasible, key=lambda config: (estimates[config], config.key))
        self._order = list(dict.fromkeys([*seeds, *ranked]))[: self.limit]
        self._blocked: dict[str, AutoflashError] = {}
        self._compiling: dict[str, tuple[Source, list[Config]]] = {}
        for record in run.stored(problem):
            self._keep(record)

    @property
    def best(self) -> Record | None:
        """The record with the least predicted time; among equals that with least shared memory."""
        found = [r for r in self.records.values() if r.outcome == "predicted"]
        return min(found, key=_merit, default=None)

    def compile(self, left_s: Callable[[], float]) -> None:
        """Compile the candidates in order until they or the time are exhausted.

        Args:
            left_s: seconds left.

        Raises:
            ToolchainMissing: nothing could be built for want of a compiler; CacheError likewise.
        """
        run = self._run
        todo = [config for config in reversed(self._order) if config not in self.records]
        while todo or self._compiling:
            in_time = left_s() > 0 or self._must_go_on()
            while in_time and todo and len(self._compiling) < 2 * run.jobs:
                self._take(todo.pop())
            if not self._compiling:
                break
            for finished in run.workers.wait(0.5):
                run.compiled[finished.key] = finished.reply
                source, configs = self._compiling.pop(finished.key, (None, []))
                for config in configs:
                    assert source is not None
                    self._compiled(config, source, finished.reply)
            if left_s() <= 0 and not self._must_go_on():
                todo.clear()
                for digest in run.workers.cancel("compile"):
                    self._compiling.pop(digest, None)
        if self._blocked and self.best is None:
            raise next(iter(self._blocked.values()))

    def _must_go_on(self) -> bool:
        """Whether the search goes on past its time: nothing has compiled yet."""
        return self.best is None and len(self.records) < HOPELESS

    def _take(self, config: Config) -> None:
        run = self._run
        if config.template in self._blocked:
            return
        try:
            source = run.templates[config.template].render(config, self.problem, run.device)
        except TemplateError as error:
            self._finish(run.record(self.problem, config, "compile_error", reason=str(error)))
            return
        if source.digest in run.compiled:
            self._compiled(config, source, run.compiled[source.digest])
        elif source.digest in self._compiling:
            self._compiling[source.digest][1].append(config)
        else:
            self._compiling[source.digest] = (source, [config])
            request = compile_request(source, run.device)
            run.workers.submit("compile", source.digest, request, run.effort.compile_timeout_s)

    def _compiled(self, config: Config, source: Source, reply: Mapping[str, Any]) -> None:
        run, problem = self._run, self.problem
        if name := reply.get("raise"):
            error: AutoflashError = getattr(errors, name)(reply["reason"])
            self._blocked.setdefault(config.template, error)
            self._report(None, f"{config.template} cannot be built here: {error}")
            return
        if reply["outcome"] != "ok":
            reason = f"compiling: {explain(reply)}"
            outcome = reply["outcome"]
            self._finish(run.record(problem, config, outcome, source=source, reason=reason))
            return
        resources = reply["resources"]
        reason_or_none = over_resources(resources, run.device)
        predicted_us = math.inf
        if reason_or_none is None:
            predicted_us = self._predict(config, Resources(**resources))
            if math.isinf(predicted_us):
                reason_or_none = "not one thread block fits a multiprocessor"
        self._finish(
            run.record(
                problem,
                config,
                "over_resources" if reason_or_none else "predicted",
                source=source,
                reason=reason_or_none or "",
                predicted_us=None if reason_or_none else predicted_us,
                resources=resources,
            )
        )

    def _predict(self, config: Config, resources: Resources | None) -> float:
        device = self._run.device
        derived = self._run.templates[config.template].derive(config, self.problem, device)
        return predict(self.problem, config, device, derived, resources)

    def _finish(self, record: Record) -> None:
        self._run.ledger.trial(record, self._run.number)
        self.fresh += 1
        self._keep(record)
        self._report(record, self._run.ledger.trouble)

    def _keep(self, record: Record) -> None:
        if (old := self.records.get(record.config)) is not None:
            self.outcomes[old.outcome] -= 1
        self.records[record.config] = record
        self.outcomes[record.outcome] += 1


def _merit(record: Record) -> tuple[float, int, str]:
    smem_bytes = record.resources.get("smem_bytes") or 0
    return record.predicted_us or 0.0, smem_bytes, record.config.key
