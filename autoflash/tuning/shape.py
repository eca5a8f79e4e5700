"""Shape: the configs that may serve one shape, checked and then timed in turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoflash.codegen.defaults import defaults
from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.errors import TemplateError
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.tuning import finals
from autoflash.tuning.predict import over_resources
from autoflash.tuning.run import DOUBTFUL, KILLS, Run, now
from autoflash.tuning.trials import (
    compile_request,
    evaluate_request,
    evaluate_timeout_s,
    explain,
    raise_named,
)

_TIMED = ("ok", "slow")
_TRIALS_MS = 8.0
"""Time of a config before the turns: enough to tell what is hopeless, which gets no turn."""
Times = Mapping[Config, float | None]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape and what may serve it.

    Attributes:
        problem: the shape.
        default: the config that serves it without records.
        sources: config -> rendered source, the default first.
    """

    problem: Problem
    default: Config
    sources: Mapping[Config, Source]

    @property
    def by_source(self) -> dict[str, list[Config]]:
        """Digest -> the configs that render that source; they are measured once."""
        found: dict[str, list[Config]] = {}
        for config, source in self.sources.items():
            found.setdefault(source.digest, []).append(config)
        return found


@dataclass(slots=True)
class _Row:
    """What is being measured of a shape: records of one moment, so that they are found together."""

    shape: Shape
    created: str
    records: dict[str, Record] = field(default_factory=dict)  # by digest of the source


class Shapes:
    """Makes, compiles and measures shapes for one run.

    Args:
        run: with a policy of its own; everything measured is stored under it.
        end: time.monotonic() at which to stop; None is never.

    Attributes:
        unsettled: shape -> how its turns failed, which no config does alone.
    """

    def __init__(self, run: Run, end: float | None) -> None:
        self._run, self._end = run, end
        self.unsettled: dict[Problem, str] = {}
        self._each_s = 0.0  # the longest measurement of a shape so far

    def in_time(self) -> bool:
        """Whether one more shape can be measured before the end."""
        return self._end is None or time.monotonic() + self._each_s < self._end

    def shape(self, problem: Problem, winners: Sequence[Config]) -> Shape | None:
        """The shape, with those of the winners that are feasible and the templates' defaults."""
        run = self._run
        accepting = {template.name: template for template in run.accepting(problem)}
        ranked = defaults(accepting.values(), problem, run.device)
        if not ranked:
            return None
        feasible = [
            config
            for config in winners
            if config.template in accepting
            and not run.is_barred(config)
            and accepting[config.template].broken(config, problem, run.device) is None
        ]
        sources: dict[Config, Source] = {}
        for config in dict.fromkeys([ranked[0], *feasible, *ranked]):
            try:
                sources[config] = accepting[config.template].render(config, problem, run.device)
            except TemplateError as error:
                if config == ranked[0]:
                    raise
                record = run.record(problem, config, "compile_error", reason=str(error))
                run.ledger.trial(record, run.number)
        return Shape(problem, ranked[0], sources)

    # Compiling ----------------------------------------------------------------------------------

    def compile(self, shapes: Iterable[Shape]) -> None:
        """Compile what these shapes need, as far as there is time.

        Raises:
            ToolchainMissing: nothing can be built for want of a compiler; CacheError likewise.
        """
        run = self._run
        for shape in shapes:
            if self._stored(shape) is not None:
                continue
            for source in shape.sources.values():
                if source.digest not in run.compiled:
                    run.compiled[source.digest] = {}
                    request = compile_request(source, run.device)
                    timeout_s = run.effort.compile_timeout_s
                    run.workers.submit("compile", source.digest, request, timeout_s)
        while run.workers.pending("compile"):
            for finished in run.workers.wait(0.5):
                run.compiled[finished.key] = finished.reply
                raise_named(finished.reply)
            if self._end is not None and time.monotonic() > self._end:
                run.workers.cancel("compile")
        run.compiled = {digest: reply for digest, reply in run.compiled.items() if reply}

    # Measuring ----------------------------------------------------------------------------------

    def measure(self, shape: Shape) -> Times | None:
        """Time of each config, as stored or measured now.

        None where its kernels are not built, or where its turns failed though every config works
        alone; `unsettled` then says how. Both are left to the next run.

        A config that fails, in whatever way, has the time None. Correct ones that are not hopeless
        are timed in turns; the others have the time of a few calls.
        """
        if (stored := self._stored(shape)) is not None:
            return stored
        if not all(source.digest in self._run.compiled for source in shape.sources.values()):
            return None
        began = time.monotonic()
        row = _Row(shape, now())
        for digest in shape.by_source:
            self._check(row, digest)
        timed = self._turns(row)
        self._each_s = max(self._each_s, time.monotonic() - began)
        return timed

    def _check(self, row: _Row, digest: str) -> None:
        """See that one source works, and about how fast it is."""
        run, problem = self._run, row.shape.problem
        config = row.shape.by_source[digest][0]
        source, built = row.shape.sources[config], run.compiled[digest]
        resources = built.get("resources", {})
        too_much = over_resources(resources, run.device) if built["outcome"] == "ok" else None
        if built["outcome"] != "ok" or too_much is not None:
            outcome = "over_resources" if too_much is not None else built["outcome"]
            reason = too_much if too_much is not None else f"compiling: {explain(built)}"
            self._add(row, digest, outcome, reason=reason, resources=resources)
            return
        so_far = [r.latency_us for r in row.records.values() if r.outcome in _TIMED]
        request = evaluate_request(run, problem, source, min(filter(None, so_far), default=None))
        request["timing_ms"] = min(_TRIALS_MS, run.effort.timing_ms)
        is_default = row.shape.default in row.shape.by_source[digest]
        reply = self._ask(request)
        if _is_doubtful(reply, is_default):
            reply = self._ask(request)
        measurement = reply.get("measurement")
        self._add(
            row, digest, reply["outcome"], reason=explain(reply), resources=resources,
            measurement=Measurement.from_dict(measurement) if measurement else None,
            error_ratio=reply.get("error_ratio"),
        )  # fmt: skip

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer on one candidate; whatever it did, the next finds a good process."""
        run = self._run
        timeout_s = evaluate_timeout_s(
            run.effort, Problem.from_dict(request["problem"]), run.device
        )
        reply = finals.ask(run, request, timeout_s, tries=1)
        raise_named(reply)
        if reply["outcome"] in KILLS or reply.get("exiting"):
            finals.greet(run)
        return reply

    def _turns(self, row: _Row) -> Times | None:
        """Time what is left in turns, and store everything that is known of the shape."""
        run, shape = self._run, row.shape
        by_source = shape.by_source
        reply: dict[str, Any] = {"outcome": "ok"}
        for _ in range(finals.ATTEMPTS):
            left = {
                by_source[digest][0]: digest
                for digest, record in row.records.items()
                if record.outcome == "ok"
            }
            if len(left) < 2:
                reply = {"outcome": "ok"}
                break
            best_us = min(row.records[digest].latency_us or 0.0 for digest in left.values())
            configs, rounds = list(left), run.effort.rounds
            reply = finals.turns(
                run, shape.problem, configs, rounds=rounds, best_us=best_us, torch=False
            )
            raise_named(reply)
            if reply["outcome"] == "ok":
                for number, digest in enumerate(left.values()):
                    took = Measurement.from_dict(reply["measurements"][str(number)])
                    row.records[digest] = dataclasses.replace(row.records[digest], measurement=took)
                break
            finals.greet(run)
            for config, failure in finals.guilty(run, shape.problem, configs, reply).items():
                row.records[left[config]] = dataclasses.replace(failure, created=row.created)
        if reply["outcome"] != "ok":
            # None of them fails alone. Measured one by one, their times could not be compared.
            self.unsettled[shape.problem] = f"in turns: {explain(reply)}"
            why = f"{DOUBTFUL}in turns: {explain(reply)}"
            for digest, record in row.records.items():
                if record.outcome == "ok":
                    row.records[digest] = dataclasses.replace(
                        record, outcome=reply["outcome"], reason=why, measurement=None
                    )
        records = [
            dataclasses.replace(row.records[digest], config=config)
            for digest, configs in by_source.items()
            for config in configs
        ]
        for record in records:
            run.ledger.trial(record, run.number)
            run.note(record)
        return _times(records) if reply["outcome"] == "ok" else None

    def _add(self, row: _Row, digest: str, outcome: str, **facts: Any) -> None:
        config = row.shape.by_source[digest][0]
        source = row.shape.sources[config]
        record = self._run.record(row.shape.problem, config, outcome, source=source, **facts)
        row.records[digest] = dataclasses.replace(record, created=row.created)

    def _stored(self, shape: Shape) -> Times | None:
        """The times of the last turns in which all of the shape's configs were."""
        together: dict[str, list[Record]] = {}
        for record in self._run.stored(shape.problem):
            together.setdefault(record.created, []).append(record)
        for created in sorted(together, reverse=True):
            times = _times(together[created])
            if set(times) >= set(shape.sources):
                return {config: times[config] for config in shape.sources}
        return None


def _is_doubtful(reply: Mapping[str, Any], is_default: bool) -> bool:
    """Whether a failure may be another's fault; without its default a shape is worth nothing."""
    if reply["outcome"] == "timeout":
        return is_default
    return reply["outcome"] == "crash" or bool(reply.get("again"))


def _times(records: Iterable[Record]) -> dict[Config, float | None]:
    return {
        record.config: record.latency_us if record.outcome in _TIMED else None for record in records
    }
