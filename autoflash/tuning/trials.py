"""Trials: the loop that proposes, compiles, runs and records configs for one problem."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoflash import errors
from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.device import Device
from autoflash.errors import AutoflashError, TemplateError, WorkerError
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.tuning import wire
from autoflash.tuning.budget import call_s
from autoflash.tuning.effort import Effort
from autoflash.tuning.pool import Finished
from autoflash.tuning.predict import over_resources, spills_heavily
from autoflash.tuning.run import DOUBTFUL, KILLS, Run, infeasible
from autoflash.tuning.search import Axes, Searcher

HOPELESS = 12
"""So many failures and no success: past its time a search is given up only then."""
OVERTIME_S = 2.0
"""What is compiled when time is up is still run for so long: compiling was the greater expense."""
CANARIES = 3
"""So many fresh workers in a row on which nothing runs: the device is to blame, not a config."""
LEAST_DEADLINE_S, SLOWER = 10.0, 20.0
"""A candidate hangs that takes so many times as long as the longest that came through, and so long
at least: a machine that is busy with other things slows down everything by less."""
COMPILE_LIMIT_S = 120.0
"""Longest that a foreign kernel may compile: it does so in the process that runs it."""
_HELLO = "hello"
_CALLS = 10  # of a candidate, to check and to time it
_TIMED = ("ok", "slow")

Report = Callable[[Record | None, str], None]
"""Called with each new record, or with None and a word on what goes on."""


@dataclass(slots=True)
class _Candidate:
    number: int  # in the order of proposals
    config: Config
    source: Source
    resources: Mapping[str, Any] | None = None
    kills: int = 0  # processes that it has brought down


class Trials:
    """The trials of one problem on a device that is present.

    Attributes:
        problem: which.
        records: config -> its record, those of earlier runs included.
        outcomes: outcome -> how many, with "infeasible" for the points of the spaces.
        fresh: trials made by this run.
        limit: most trials, those of earlier runs included.
        defaults: the default config of every template that accepts the problem and is feasible.
        champion: the stored winner when the search began, or None.
        refusals: template -> why it does not take the problem, or cannot be compiled here.
    """

    def __init__(self, run: Run, problem: Problem, *, limit: int, report: Report) -> None:
        self.problem = problem
        self.records: dict[Config, Record] = {}
        self.fresh = 0
        self._run = run
        self._report = report
        templates = run.accepting(problem)
        self.refusals = run.refusals(problem)
        spaces = {t.name: t.space(problem, run.device) for t in templates}
        self.outcomes: Counter[str] = Counter()
        if rejected := infeasible(spaces.values()):
            self.outcomes["infeasible"] = rejected
        every_default = (t.default_config(problem, run.device) for t in templates)
        self.defaults = [c for c in every_default if c in set(spaces[c.template].configs)]
        seeds = run.seeds(problem, templates) if run.strategy.seeds else []
        self._seeds = set(seeds)
        self._searcher = Searcher(
            {t.name: Axes(t.tunables, spaces[t.name].configs) for t in templates},
            seeds=seeds,
            seed=run.seed,
            sampler=run.strategy.sampler,
        )
        self.champion = run.best(problem)
        # What must be known before a winner is named: it is tried whatever the limits.
        self._musts = [*self.defaults]
        held = self.champion.config if self.champion else None
        if held is not None and held not in self._musts and held.template in spaces:
            self._musts += [held] if held in set(spaces[held.template].configs) else []
        self.limit = min(limit, len(self._searcher))
        # On a CPU compilers would disturb what is timed: a batch is compiled, then measured.
        self._exclusive = not run.device.is_cuda
        # On a GPU no more than keeps all compilers busy: each proposal learns from what is known.
        # Foreign kernels are compiled as they run, one by one.
        jobs = 1 if problem.is_foreign else run.jobs
        self._batch = 2 * jobs if self._exclusive else jobs + 2
        self._compiling: dict[str, _Candidate] = {}
        self._ready: list[_Candidate] = []
        self._running: _Candidate | None = None
        self._twins: dict[str, list[Config]] = {}  # same source as a candidate under way
        self._by_source: dict[str, Record] = {}
        self._greeting = 0  # canaries tried in a row on fresh workers
        self._suspect = False  # the last candidate took its worker down
        self._warm = False  # the worker has run a candidate of this problem and lives
        self._unused = False  # the worker has run no candidate yet
        self._longest_s = 0.0  # that a candidate of this problem took, of those that came through
        self._proposed = 0
        self._closed = False  # nothing more is asked for
        self._swept = False  # the searcher has nothing more to propose
        self._blocked: dict[str, AutoflashError] = {}  # template -> why it cannot be built here
        self._evaluate_s = 0.5 + _CALLS * call_s(problem, run.device)  # a moving average
        for record in run.stored(problem):
            self._keep(record)
        # A default that is new to a full budget is tried beyond it: without one nobody can win. So
        # is the stored winner, which may come from elsewhere: it loses its title to nobody untried.
        new = [config for config in self._musts if config not in self.records]
        self.limit = max(self.limit, len(self.records) + len(new) if new else 0)

    @property
    def best(self) -> Record | None:
        """The fastest correct trial."""
        timed = [r for r in self.records.values() if r.is_measured and r.latency_us is not None]
        return min(timed, key=lambda record: record.latency_us or 0.0, default=None)

    @property
    def best_us(self) -> float | None:
        """Its time."""
        return self.best.latency_us if self.best else None

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left to try, of the space or of the number of trials."""
        return len(self.records) >= self.limit or (self._swept and not self._blocked)

    @property
    def obstacle(self) -> str:
        """What keeps a template from being built here, or ""."""
        return next((f"{name} cannot be built: {why}" for name, why in self._blocked.items()), "")

    def search(self, left_s: Callable[[], float]) -> None:
        """Try configs until the space, the number of trials or the time is exhausted.

        However short the time, it goes on until one config works.

        Args:
            left_s: seconds left for the search; it may shrink as the best time becomes known.

        Raises:
            ToolchainMissing: no config could be built for want of a compiler; CacheError likewise.
            WorkerError: the device does not work.
        """
        self._left_s = left_s
        while True:
            self._propose()
            self._run_next()
            if not (self._compiling or self._running or self._ready or self._suspect):
                break
            for finished in self._run.workers.wait(0.5):
                self._handle(finished)
            if self._compiling and self._out_of_time():
                for digest in self._run.workers.cancel("compile"):
                    self._compiling.pop(digest, None)
                    self._twins.pop(digest, None)
        if self._blocked and self.best is None:
            raise next(iter(self._blocked.values()))

    # Proposing ----------------------------------------------------------------------------------

    def _propose(self) -> None:
        if self._exclusive and (self._ready or self._running):
            return
        already = len(self._compiling)
        while self._may_ask():
            config = self._searcher.ask()
            if config is None:
                self._closed = self._swept = True
            elif config.template in self._blocked or self._is_barred(config):
                self._searcher.tell(config, None)
            else:
                self._take(config)
        if self._exclusive and len(self._compiling) > already:
            self._report(None, f"compiling {len(self._compiling)} kernels")

    def _may_ask(self) -> bool:
        under_way = len(self._compiling) + len(self._ready) + bool(self._running)
        if self._closed or under_way >= self._batch:
            return False
        if len(self.records) + under_way >= self.limit:
            return False
        if not self.fresh and self._proposed >= len(self._musts) and not self._has_time():
            return under_way == 0  # whether to go on is known when the defaults are
        return not self._out_of_time()

    def _is_barred(self, config: Config) -> bool:
        """Whether to leave out a config for what it did on other problems; never a must."""
        return config not in self._musts and self._run.is_barred(config)

    def _lacks_musts(self) -> bool:
        """Whether one that must be tried, among the first proposals, is still unknown."""
        return any(c not in self.records and c.template not in self._blocked for c in self._musts)

    def _out_of_time(self) -> bool:
        """Whether to stop: never before a default and one config that works, if any does."""
        if (self.best is None or self._lacks_musts()) and self.fresh < HOPELESS:
            return False
        return self._left_s() <= 0

    def _fits(self, config: Config) -> bool:
        """Whether one more compilation, and the run after it, will end in time."""
        return config in self._musts or (self.best is None and self.fresh > 0) or self._has_time()

    def _has_time(self) -> bool:
        waiting = len(self._compiling) + 1
        waves = math.ceil(waiting / self._run.jobs)
        if self._compiling and waves == math.ceil(len(self._compiling) / self._run.jobs):
            waves -= 1  # a compiler that would be idle costs nothing
        needed = waves * self._run.compile_s
        needed += (len(self._ready) + waiting if self._exclusive else 1) * self._evaluate_s
        return needed < self._left_s()

    def _take(self, config: Config) -> None:
        run = self._run
        try:
            source = run.templates[config.template].render(config, self.problem, run.device)
        except TemplateError as error:
            self._finish(run.record(self.problem, config, "compile_error", reason=str(error)))
            return
        self._proposed += 1
        candidate = _Candidate(self._proposed, config, source)
        if twin := self._by_source.get(source.digest):
            self._finish(_of_twin(twin, config))
        elif source.digest in self._twins:
            self._twins[source.digest].append(config)
        elif source.digest in run.compiled:
            self._twins[source.digest] = []
            self._compiled(candidate, run.compiled[source.digest])
        elif not self._fits(config):
            self._closed = True
        else:
            self._twins[source.digest] = []
            self._compile(candidate)

    def _compile(self, candidate: _Candidate) -> None:
        run, source = self._run, candidate.source
        self._compiling[source.digest] = candidate
        request = compile_request(source, run.device)
        run.workers.submit("compile", source.digest, request, run.effort.compile_timeout_s)

    # Running ------------------------------------------------------------------------------------

    def _run_next(self) -> None:
        run = self._run
        if self._running or run.workers.pending("device"):
            return
        if self._suspect:
            request: dict[str, Any] = {"kind": _HELLO, "device": run.device.to_dict()}
            run.workers.submit("device", _HELLO, request, run.effort.evaluate_timeout_s)
            return
        if not self._ready or (self._exclusive and self._compiling):
            return
        if self._out_of_time() and self._left_s() < -OVERTIME_S:
            self._ready.clear()
            self._twins.clear()
            return
        # In the order of proposals, whichever was compiled first: the default comes first.
        self._running = min(self._ready, key=lambda candidate: candidate.number)
        self._ready.remove(self._running)
        request = evaluate_request(run, self.problem, self._running.source, self.best_us)
        timeout_s = evaluate_timeout_s(run.effort, self.problem, run.device)
        if self._warm and not self.problem.is_foreign:
            timeout_s /= 3  # the inputs and what is expected of them are there already
            timeout_s = min(timeout_s, max(LEAST_DEADLINE_S, SLOWER * self._longest_s))
        run.workers.submit("device", self._running.source.digest, request, timeout_s)

    def _handle(self, finished: Finished) -> None:
        reply = finished.reply
        if finished.role == "compile":
            self._run.compiled[finished.key] = reply
            self._run.compile_s += 0.3 * (finished.seconds - self._run.compile_s)
            candidate = self._compiling.pop(finished.key, None)
            if candidate is not None:
                self._compiled(candidate, reply)
        elif finished.key == _HELLO:
            self._greeted(reply)
        elif self._running is not None and finished.key == self._running.source.digest:
            self._evaluate_s += 0.3 * (finished.seconds - self._evaluate_s)
            if reply["outcome"] in _TIMED:
                self._longest_s = max(self._longest_s, finished.seconds)
            candidate, self._running = self._running, None
            self._evaluated(candidate, reply)

    def _compiled(self, candidate: _Candidate, reply: Mapping[str, Any]) -> None:
        run = self._run
        config, source = candidate.config, candidate.source
        if "raise" in reply:
            self._block(candidate, reply)
            return
        outcome = reply["outcome"]
        if outcome != "ok":
            doubtful = outcome in KILLS and config in self._musts and candidate.kills == 0
            reason = (DOUBTFUL if doubtful else "") + f"compiling: {explain(reply)}"
            record = run.record(self.problem, config, outcome, source=source, reason=reason)
            if not doubtful:
                self._finish(record)
                return
            run.ledger.trial(record, run.number)
            self._report(None, f"{config.key}: {outcome}; compiled again in a fresh process")
            candidate.kills = 1
            self._compile(candidate)
            return
        candidate.kills = 0
        candidate.resources = reply["resources"]
        reason_or_none = over_resources(reply["resources"], run.device)
        if reason_or_none is None and config not in self._seeds:
            # Where everything spills something must still be measured: the seeds.
            reason_or_none = spills_heavily(reply["resources"], run.device)
        if reason_or_none is not None:
            self._finish(
                run.record(
                    self.problem, config, "over_resources", source=source, reason=reason_or_none,
                    resources=reply["resources"],
                )
            )  # fmt: skip
        else:
            self._ready.append(candidate)

    def _block(self, candidate: _Candidate, reply: Mapping[str, Any]) -> None:
        """Give up a template that cannot be built: no other config of it can be either."""
        config = candidate.config
        error: AutoflashError = getattr(errors, reply["raise"])(reply["reason"])
        self._blocked.setdefault(config.template, error)
        self._twins.pop(candidate.source.digest, None)
        self._searcher.tell(config, None)
        self._report(None, f"{config.template} cannot be built here: {error}")

    def _evaluated(self, candidate: _Candidate, reply: Mapping[str, Any]) -> None:
        outcome = reply["outcome"]
        self._suspect = outcome in KILLS or bool(reply.get("exiting"))
        self._warm = outcome in (*_TIMED, "wrong_result") and not self._suspect
        unused, self._unused = self._unused, False
        if "raise" in reply:
            self._block(candidate, reply)
            return
        measurement = reply.get("measurement")
        doubtful = candidate.kills == 0 and self._is_doubtful(candidate, reply, unused)
        record = self._run.record(
            self.problem,
            candidate.config,
            outcome,
            source=candidate.source,
            reason=(DOUBTFUL if doubtful else "") + explain(reply),
            measurement=Measurement.from_dict(measurement) if measurement else None,
            error_ratio=reply.get("error_ratio"),
            resources=candidate.resources,
        )
        if doubtful:
            # What happened is stored all the same: the tuner may be killed before the second try.
            self._run.ledger.trial(record, self._run.number)
            self._report(None, f"{record.config.key}: {outcome}; run again in a fresh process")
            candidate.kills = 1
            self._ready.append(candidate)
        else:
            self._finish(record)

    def _is_doubtful(self, candidate: _Candidate, reply: Mapping[str, Any], unused: bool) -> bool:
        """Whether a failure may be another's fault, so that one more process is spent on it.

        A candidate may have ruined the process for those behind it: what crashes or runs out of
        memory in a process that ran others is not believed yet. And without its default a problem
        has no winner to be trusted: a default must cost two processes to be given up, and so must
        the stored winner.
        """
        if reply["outcome"] == "timeout":
            return candidate.config in self._musts
        if reply["outcome"] == "crash":
            return not unused or candidate.config in self._musts
        return bool(reply.get("again"))

    def _greeted(self, reply: Mapping[str, Any]) -> None:
        if reply["outcome"] == "ok":
            self._suspect, self._greeting, self._unused = False, 0, True
            return
        self._greeting += 1
        if self._greeting >= CANARIES:
            raise device_failed(self._run.device, reply)

    # Keeping ------------------------------------------------------------------------------------

    def _finish(self, record: Record) -> None:
        run = self._run
        twins = self._twins.pop(record.source_digest, [])
        for each in (record, *(_of_twin(record, config) for config in twins)):
            run.ledger.trial(each, run.number)
            run.note(each)
            self.fresh += 1
            self._keep(each)
            self._report(each, run.ledger.trouble)

    def _keep(self, record: Record) -> None:
        if (old := self.records.get(record.config)) is not None:
            self.outcomes[old.outcome] -= 1
        self.records[record.config] = record
        self.outcomes[record.outcome] += 1
        if record.source_digest:
            self._by_source[record.source_digest] = record
        self._searcher.tell(record.config, record.latency_us if record.outcome in _TIMED else None)


def compile_request(source: Source, device: Device) -> dict[str, Any]:
    """What a compile worker is sent."""
    return {
        "kind": "compile",
        "source": wire.source_to_dict(source),
        "device": device.to_dict(),
    }


def evaluate_request(
    run: Run, problem: Problem, source: Source, best_us: float | None
) -> dict[str, Any]:
    """What a device worker is sent to check and time one candidate."""
    return {
        "kind": "evaluate",
        "source": wire.source_to_dict(source),
        "problem": problem.to_dict(),
        "device": run.device.to_dict(),
        "seed": run.seed,
        "timing_ms": run.effort.timing_ms,
        "best_us": best_us,
    }


def evaluate_timeout_s(effort: Effort, problem: Problem, device: Device) -> float:
    """After how long a candidate is taken to hang: ten calls at 2% of the peak come on top."""
    peak_flops = max(device.tflops_peak(problem.dtype), 0.01) * 1e12
    compiling_s = COMPILE_LIMIT_S if problem.is_foreign else 0.0
    return effort.evaluate_timeout_s + compiling_s + 10 * 50 * problem.flops / peak_flops


def explain(reply: Mapping[str, Any]) -> str:
    """One line on what went wrong, with the last line that a dead worker wrote."""
    reason = str(reply.get("reason", ""))
    lines = [line.strip() for line in str(reply.get("stderr", "")).splitlines() if line.strip()]
    if reply["outcome"] in ("crash", "timeout") and lines:
        # Python's own dump is longer than what the kernel had to say before it.
        fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python")), None)
        words = lines[fatal - 1 if fatal else -1] if fatal != 0 else lines[0]
        reason += f" (last words: {words[:200]})"
    return reason


def raise_named(reply: Mapping[str, Any]) -> None:
    """Raise what is no candidate's fault: no compiler, or a cache that cannot be written."""
    if name := reply.get("raise"):
        error: AutoflashError = getattr(errors, name)(reply["reason"])
        raise error


def device_failed(device: Device, reply: Mapping[str, Any]) -> WorkerError:
    """The error for a device on which not even PyTorch runs."""
    return WorkerError(
        f"{device.name}: {CANARIES} fresh worker processes in a row could not use it; the last: "
        f"{explain(reply)}. What was tried before is stored. Check `autoflash doctor` and, for a "
        "GPU, whether nvidia-smi lists it."
    )


def _of_twin(record: Record, config: Config) -> Record:
    """The record of a config whose rendered source is that of a recorded one."""
    return dataclasses.replace(record, config=config)
