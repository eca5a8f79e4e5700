"""Tuner: find the fastest config of each problem on a device, and remember it."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from autoflash import build, settings
from autoflash.build import cache
from autoflash.codegen.catalog import Catalog, installed
from autoflash.codegen.template import Template
from autoflash.device import Device
from autoflash.errors import DatabaseError, InvalidInput
from autoflash.problem import Problem, require_work
from autoflash.record import Record
from autoflash.tuning import effort as efforts
from autoflash.tuning import finals
from autoflash.tuning.absent import Predictions
from autoflash.tuning.boards import Board, held
from autoflash.tuning.boards import of as board_of
from autoflash.tuning.budget import Budget
from autoflash.tuning.crew import Crew
from autoflash.tuning.effort import EFFORTS, Effort
from autoflash.tuning.plan import Plan, TemplatePlan, plan
from autoflash.tuning.pool import Pool, Workers
from autoflash.tuning.predict import MODEL
from autoflash.tuning.progress import STATUSES, Event, Listener, TuneResult
from autoflash.tuning.run import Run, is_present
from autoflash.tuning.timing import policy_for
from autoflash.tuning.trials import Report, Trials

if TYPE_CHECKING:
    from autoflash.database import Database

__all__ = [
    "EFFORTS",
    "STATUSES",
    "Effort",
    "Event",
    "Plan",
    "TemplatePlan",
    "TuneResult",
    "is_present",
    "plan",
    "tune",
]


def tune(
    problems: Sequence[Problem],
    device: Device,
    *,
    database: Database,
    effort: str | Effort = "normal",
    max_trials: int | None = None,
    max_seconds: float | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
    on_event: Listener | None = None,
    catalog: Catalog | None = None,
    workers: Workers | None = None,
    command: str = "tune",
    boards: Sequence[Board] = (),
) -> list[TuneResult]:
    """Tune each problem and store every trial at once.

    On one device problems come one after the other. On several each takes the next one, and does
    all of it (autoflash.tuning.crew).

    On a device that is present candidates are compiled, checked and timed, and the best are timed
    again beside the template's default and PyTorch. For one that is absent they are compiled and
    ranked by the static model.

    A run goes on where an earlier one stopped, however that ended: its trials count towards
    the budget and are not repeated. Where nothing is left to try and the stored winner is current,
    nothing is run at all and that winner is the result.

    Ctrl-C ends the workers at once; what was found so far is returned, with status "partial" for
    the problem under way and those behind it.

    Args:
        problems: what to tune; repeats are tuned once.
        device: what for.
        database: where trials and winners go.
        effort: "quick", "normal", "full", or an Effort.
        max_trials: per problem, in place of the effort's; earlier trials count.
        max_seconds: for all problems together, in place of the effort's; problems that it does
            not reach are "partial".
        templates: names of those that may be used; None is all.
        seed: of the order of trials and of the inputs.
        on_event: called with each Event.
        catalog: of templates; None is the installed one.
        workers: what compiles and runs candidates; None: processes of our own.
        command: what to note as the cause of this run.
        boards: which devices of this host, all of the kind of `device`; none is the first. More
            than there are problems are not used.

    Returns:
        One result per problem, in order.

    Raises:
        InvalidInput: a problem has no work in it, or a limit is not positive.
        UnknownName: there is no such template or effort.
        ToolchainMissing: nothing can be built for want of a compiler.
        CacheError: another process tunes this device, or the cache cannot be written.
        WorkerError: the device does not work, or none of several does.
        DatabaseError: the database cannot be used, or not everything could be stored in the end.
    """
    wanted = list(dict.fromkeys(problems))
    _check(wanted, max_trials, max_seconds)
    every = catalog or installed()
    chosen = _chosen(every, templates)
    at_once = max(1, min(len(boards), len(wanted)))
    each_s = max_seconds * at_once / max(1, len(wanted)) if max_seconds else None
    budget = efforts.of(effort).within(each_s)
    present = bool(boards) or is_present(device) or workers is not None
    languages = {template.language for template in chosen.values()}
    jobs = build.jobs_within_memory(settings.get().jobs, languages, device)
    with ExitStack() as stack:
        root = cache.root()
        if present and workers is None:
            boards = boards[: len(wanted)] or [board_of(device)]
            stack.enter_context(held(boards, root))
        several = len(boards) > 1
        if workers is None:
            visible = boards[0].visible if boards and not several else ""
            workers = Pool(jobs=jobs, cache_dir=root, visible=visible)
        stack.callback(workers.close)
        run = Run(
            device=device,
            templates=chosen,
            others={name: t for name, t in every.templates.items() if name not in chosen},
            database=database,
            effort=budget,
            policy=policy_for(device).id if present else MODEL,
            workers=workers,
            seed=seed,
            jobs=jobs,
        )
        share = Budget(
            wanted, device, per_problem=budget.seconds if present else budget.compile_seconds,
            in_all=max_seconds, running=present, devices=max(1, len(boards)),
        )  # fmt: skip
        asked: dict[str, Any] = {
            "effort": budget.name, "max_trials": max_trials, "max_seconds": max_seconds
        }  # fmt: skip
        if several:
            asked["devices"] = [board.lock or board.label for board in boards]

        def tuning(run: Run, tell: Listener) -> _Tuning:
            return _Tuning(run, wanted, present, share, asked, tell)

        tell: Listener = on_event or (lambda event: None)
        if not several:
            return tuning(run, tell).run_all(command)
        runners = {
            board.label: Pool(jobs=0, cache_dir=root, visible=board.visible) for board in boards
        }
        for runner in runners.values():
            stack.callback(runner.close)
        crew = Crew(run, runners, tuning, problems=len(wanted), on_event=tell)
        return crew.run_all(command)


class _Tuning:
    """One call of `tune` on one device, problem by problem."""

    def __init__(
        self,
        run: Run,
        problems: Sequence[Problem],
        present: bool,
        budget: Budget,
        asked: Mapping[str, Any],
        tell: Listener,
    ) -> None:
        self.run = run
        self._problems = problems
        self._present = present
        self._tell = tell
        effort = run.effort
        self._limit = asked["max_trials"] or (effort.trials if present else effort.compiles)
        self._budget = budget
        self._asked = asked
        self._under_way: Trials | Predictions | None = None

    def run_all(self, command: str) -> list[TuneResult]:
        run, problems = self.run, self._problems
        results: list[TuneResult] = []
        status = "failed"
        try:
            self.greet()
            self.begin(command)
            while len(results) < len(problems):
                results.append(self.tune(len(results)))
            status = "done"
        except KeyboardInterrupt:
            run.workers.close()
            status = "interrupted"
            results += [self.interrupted(i) for i in range(len(results), len(problems))]
        finally:
            run.workers.close()
            if run.number is not None:
                # Without this note a run is taken for one that was killed: nothing is lost by that.
                with suppress(DatabaseError):
                    run.database.finish_run(run.number, status)
                run.ledger.close()
        return results

    def begin(self, command: str) -> int:
        """Note the run in the database; time counts from now."""
        run = self.run
        run.number = run.database.start_run(
            command=command,
            device=run.device,
            environment=run.environment,
            seed=run.seed,
            budget=self._asked,
        )
        self._budget.start()
        return run.number

    def greet(self) -> None:
        """Start the device's worker, see that the device works, and ask for its versions."""
        run = self.run
        if not self._present:
            from autoflash.tuning.environment import environment

            run.environment = environment(run.device)
            return
        finals.greet(run)

    def tune(self, index: int) -> TuneResult:
        """Tune the problem of that place."""
        problem = self._problems[index]
        self._under_way = None
        started = time.monotonic()
        if self._budget.is_spent():
            reason = "the time was used up before its turn"
            result = TuneResult(
                problem=problem, status="partial", best=self.run.best(problem), reason=reason
            )
        elif self._present:
            result = self._measure(index, problem)
        else:
            result = self._rank(index, problem)
        result = dataclasses.replace(result, elapsed_s=time.monotonic() - started)
        self._budget.finish(index)
        self._event(
            "done", index, record=result.best, done=result.trials, total=result.trials,
            best_us=result.best.latency_us if result.best else None,
            message=result.reason or STATUSES[result.status],
        )  # fmt: skip
        return result

    def _measure(self, index: int, problem: Problem) -> TuneResult:
        """Tune one problem on the device that is present."""
        run = self.run
        trials = Trials(run, problem, limit=self._limit, report=self._reporter(index))
        self._under_way = trials
        count = len(trials.records)
        self._event("start", index, done=count, total=trials.limit, best_us=trials.best_us)
        champion = trials.champion
        deadline = self._budget.deadline(index)
        trials.search(lambda: deadline - time.monotonic() - finals.estimate_s(run, trials.best_us))
        if trials.best is None:
            return self._result("invalid", trials, None, _why_invalid(trials))
        records = list(trials.records.values())
        # A run that was ended before its finals leaves trials that no finals have judged.
        newer = any(r.is_measured and champion and r.created > champion.created for r in records)
        if not trials.fresh and champion is not None and champion.is_measured and not newer:
            if not trials.is_exhausted:
                reason = trials.obstacle or "no time for another trial"
                return self._result("partial", trials, champion, f"{reason}; stored earlier")
            improved = champion.config not in trials.defaults
            status = "improved" if improved else "unimproved"
            return self._result(status, trials, champion, "nothing left to try; stored earlier")
        verdict = finals.decide(run, problem, records, trials.defaults, champion)
        for record in verdict.finalists:
            self._event(
                "finalist", index, record=record, best_us=verdict.best.latency_us,
                done=len(records), total=trials.limit,
            )  # fmt: skip
        if verdict.reason:
            return self._result("partial", trials, verdict.best, verdict.reason)
        run.ledger.winner(verdict.best)
        status, reason = "improved" if verdict.improved else "unimproved", ""
        if not trials.is_exhausted:
            tried = f"{len(records)} of {trials.limit} trials"
            reason = f"{STATUSES[status]}; time for {tried}: run it again, or with more effort"
        return self._result(status, trials, verdict.best, reason)

    def _rank(self, index: int, problem: Problem) -> TuneResult:
        """Compile and rank the configs of one problem for a device that is absent."""
        run = self.run
        found = Predictions(run, problem, limit=self._limit, report=self._reporter(index))
        self._under_way = found
        self._event("start", index, done=len(found.records), total=found.limit)
        deadline = self._budget.deadline(index)
        found.compile(lambda: deadline - time.monotonic())
        best = found.best
        if best is None:
            return self._result("invalid", found, None, _why_invalid(found))
        run.ledger.winner(best)
        count = len(found.records)
        scope = "all" if count >= found.feasible else f"the {count} most promising of"
        return self._result(
            "predicted", found, best, f"compiled {scope} {found.feasible} feasible configs"
        )

    def interrupted(self, index: int) -> TuneResult:
        """The result of a problem that Ctrl-C cut short or kept from its turn."""
        problem, trials = self._problems[index], self._under_way
        reason = "interrupted; run it again to go on"
        if trials is not None and trials.problem == problem:
            return self._result("partial", trials, trials.best, reason)
        return TuneResult(problem=problem, status="partial", best=None, reason=reason)

    def close(self) -> None:
        """End the worker, and store what waits for room."""
        self.run.workers.close()
        self.run.ledger.close()

    def lost(self, index: int, message: str) -> None:
        """Tell that the device has failed while it had that problem."""
        self._event("lost", index, message=message)

    def _result(
        self, status: str, trials: Trials | Predictions, best: Record | None, reason: str = ""
    ) -> TuneResult:
        return TuneResult(
            problem=trials.problem,
            status=status,
            best=best,
            outcomes=+trials.outcomes,
            trials=len(trials.records),
            reason=reason,
        )

    def _reporter(self, index: int) -> Report:
        """Turns what happens among the trials of a problem into events."""

        def report(record: Record | None, message: str) -> None:
            trials = self._under_way
            if trials is not None:
                best = trials.best
                self._event(
                    "trial", index, done=len(trials.records), total=trials.limit, record=record,
                    best_us=best.latency_us if best else None, message=message,
                )  # fmt: skip

        return report

    def _event(self, kind: str, index: int, **facts: Any) -> None:
        self._tell(
            Event(
                kind=kind,
                problem=self._problems[index],
                index=index,
                total_problems=len(self._problems),
                **facts,
            )
        )


def _check(problems: Sequence[Problem], max_trials: int | None, max_seconds: float | None) -> None:
    if not problems:
        raise InvalidInput("there is no problem to tune: the list is empty.")
    require_work(problems)
    for name, value in (("max_trials", max_trials), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise InvalidInput(f"{name}={value}: it must be greater than 0.")


def _chosen(catalog: Catalog, names: Sequence[str] | None) -> Mapping[str, Template]:
    if names is None:
        return catalog.templates
    return {name: catalog.get(name) for name in names}


def _why_invalid(trials: Trials | Predictions) -> str:
    """What stands between a problem and its first valid config, most frequent first."""
    if not trials.records:
        if trials.refusals:
            refused = "; ".join(f"{name}: needs {why}" for name, why in trials.refusals.items())
            return f"no template takes it ({refused})"
        return "no config is feasible; `autoflash plan` lists what rejects them"
    failed = [r for r in trials.records.values() if r.outcome not in ("ok", "predicted")]
    reasons = Counter(f"{record.outcome}: {record.reason}" for record in failed)
    return "; ".join(f"{count}x {why}" for why, count in reasons.most_common(3))
