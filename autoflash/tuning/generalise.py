"""Generalise: measure a family's winners on shapes between theirs, choose what serves those."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoflash import build, settings
from autoflash.build import cache
from autoflash.codegen.catalog import Catalog, installed
from autoflash.codegen.defaults import is_first_default
from autoflash.config import Config
from autoflash.device import Device
from autoflash.dispatch_table import TURNS, DispatchTable, Family, Probe
from autoflash.errors import DatabaseError, InvalidInput
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.tuning import effort as efforts
from autoflash.tuning import finals
from autoflash.tuning.boards import held
from autoflash.tuning.boards import of as board_of
from autoflash.tuning.effort import Effort
from autoflash.tuning.partition import partition
from autoflash.tuning.pool import Pool, Workers
from autoflash.tuning.probes import is_held_out, probes
from autoflash.tuning.progress import Event, Listener
from autoflash.tuning.run import Run, is_present, now
from autoflash.tuning.shape import Shape, Shapes
from autoflash.tuning.timing import policy_for

if TYPE_CHECKING:
    from autoflash.database import Database

PROBES = 30
"""Shapes of a family: 24 to choose by, 6 to tell what the choice is worth."""
FEWEST = 5
"""Shapes measured below which nothing is chosen: four to choose by and one held out."""
MOST_WINNERS = 8
"""Configs of a family that are tried everywhere, those that won most often first."""
_NO_DEFAULT = "its default does not work (`autoflash show --all` says why)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generalised:
    """What became of one family.

    Attributes:
        family: which.
        status: "improved" (a leaf beats the default), "unimproved" (the default is best
            everywhere), "partial" (not all shapes were measured), "invalid" (too few were).
        table: chosen and stored; None where too few shapes were measured.
        measured: shapes measured, those of earlier runs included.
        wanted: shapes asked for.
        reason: for "partial" and "invalid", why; else "".
    """

    family: Family
    status: str
    table: DispatchTable | None
    measured: int
    wanted: int
    reason: str = ""


def generalise(
    winners: Iterable[Record],
    device: Device,
    *,
    database: Database,
    count: int = PROBES,
    effort: str | Effort = "quick",
    max_seconds: float | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
    on_event: Listener | None = None,
    catalog: Catalog | None = None,
    workers: Workers | None = None,
    command: str = "generalise",
) -> list[Generalised]:
    """Choose a dispatch table for each family of the winners, by measuring them between.

    On each probe shape the family's winners and the templates' defaults are checked as the tuner
    checks candidates, and those that are not hopeless are timed in turns. The families take turns
    too, and any beginning of a family's shapes is spread over all of them: whenever time runs out,
    each table is chosen from what there is.

    What was measured is stored as trials, shape by shape. A shape whose configs all have one of the
    same turns is not measured again; a table is chosen anew in any case.

    Args:
        winners: records; those that are not measured on this device by templates as they are now
            are left out.
        device: where; it must be present.
        database: where trials and tables go.
        count: shapes of each family.
        effort: how carefully the turns are timed: rounds and time of an Effort's finals.
        max_seconds: for everything; None is no limit.
        templates: names of those that may be used; None is all.
        seed: of the shapes, of the inputs, and of the order of turns.
        on_event: called with each Event.
        catalog: of templates; None is the installed one.
        workers: what compiles and runs candidates; None: processes of our own.
        command: what to note as the cause of this run.

    Returns:
        One result per family, in the order of the winners.

    Raises:
        InvalidInput: no winner is left, a limit is not positive, or the device is absent.
        UnknownName: there is no such template or effort.
        ToolchainMissing: nothing can be built for want of a compiler.
        CacheError: another process tunes this device, or the cache cannot be written.
        WorkerError: the device does not work.
        DatabaseError: the database cannot be used, or not everything could be stored in the end.
    """
    known = catalog or installed()
    chosen = known.templates if templates is None else {n: known.get(n) for n in templates}
    budget = efforts.of(effort)
    if not (is_present(device) or workers is not None):
        raise InvalidInput(
            f"{device.name} ({device.arch}) is not here: how far winners carry can only be "
            "measured. Run this on a machine that has it."
        )
    for name, value in (("probes", count - FEWEST + 1), ("seconds", max_seconds)):
        if value is not None and not value > 0:
            least = f"at least {FEWEST}" if name == "probes" else "greater than 0"
            given = count if name == "probes" else max_seconds
            raise InvalidInput(f"{name}={given}: it must be {least}.")
    languages = {template.language for template in chosen.values()}
    jobs = build.jobs_within_memory(settings.get().jobs, languages, device)
    policy = policy_for(device).id
    with ExitStack() as stack:
        root = cache.root()
        if workers is None:
            board = board_of(device)
            stack.enter_context(held([board], root))
            workers = Pool(jobs=jobs, cache_dir=root, visible=board.visible)
        stack.callback(workers.close)
        run = Run(
            device=device,
            templates=chosen,
            database=database,
            effort=budget,
            policy=policy + TURNS,
            workers=workers,
            seed=seed,
            jobs=jobs,
        )
        holding = [
            record
            for record in winners
            if record.is_measured
            and not record.problem.is_foreign  # tables serve attention()
            and (record.device.key, record.policy) == (device.key, policy)
            and run.is_current(record)
        ]
        if not holding:
            raise InvalidInput(
                f"there is no winner to generalise on {device.name}: none of what was asked for "
                "was measured here with templates as they are now. `autoflash tune` makes some; "
                "`autoflash show` lists what there is."
            )
        limits = {"probes": count, "max_seconds": max_seconds, "effort": budget.name}
        work = _Generalising(run, holding, count, max_seconds, on_event or (lambda event: None))
        return work.all(command, limits)


class _FamilyWork:
    """One family: its winners, its shapes and what was measured of them."""

    def __init__(self, family: Family, records: Sequence[Record], run: Run, count: int) -> None:
        self.family = family
        fastest_first = sorted(records, key=lambda record: record.latency_us or 0.0)
        won = Counter(record.config for record in fastest_first)
        self.configs = [config for config, _ in won.most_common(MOST_WINNERS)]
        self.tuned = [
            (record.problem, None if _won_by_default(record, run) else record.config)
            for record in records
        ]
        tuned = [record.problem for record in records]
        self.shapes = probes(tuned, run.device, count, run.seed)
        self.times: dict[Problem, tuple[Config, Mapping[Config, float | None]]] = {}
        self.lost: dict[Problem, str] = {}  # shapes that cannot be measured, and why


class _Generalising:
    """One call of `generalise`."""

    def __init__(
        self,
        run: Run,
        records: Sequence[Record],
        count: int,
        max_seconds: float | None,
        tell: Listener,
    ) -> None:
        self._run, self._tell = run, tell
        families: dict[Family, list[Record]] = {}
        for record in records:
            families.setdefault(Family.of(record.problem), []).append(record)
        self._families = [
            _FamilyWork(family, some, run, count) for family, some in families.items()
        ]
        self._seconds = max_seconds
        self._total = sum(len(work.shapes) for work in self._families)
        self._done = 0
        self._unsettled: Mapping[Problem, str] = {}

    def all(self, command: str, limits: Mapping[str, object]) -> list[Generalised]:
        run = self._run
        status = "failed"
        reason = "the time was used up; run it again to go on"
        try:
            finals.greet(run)
            run.number = run.database.start_run(
                command=command,
                device=run.device,
                environment=run.environment,
                seed=run.seed,
                budget=limits,
            )
            self._measure()
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            reason = "interrupted; run it again to go on"
        finally:
            run.workers.close()
            if run.number is not None:
                with suppress(DatabaseError):
                    run.database.finish_run(run.number, status)
            run.ledger.close()
        return [self._conclude(work, reason) for work in self._families]

    def _measure(self) -> None:
        """Measure shape after shape, of each family in its turn, until the time is used up."""
        end = None if self._seconds is None else time.monotonic() + self._seconds
        shapes = Shapes(self._run, end)
        self._unsettled = shapes.unsettled
        for number in range(max(len(work.shapes) for work in self._families)):
            turn = []
            for work in self._families:
                if number >= len(work.shapes):
                    continue
                shape = shapes.shape(work.shapes[number], work.configs)
                if shape is None:
                    work.lost[work.shapes[number]] = "no template serves it without records"
                else:
                    turn.append((work, shape))
            # The kernels of a turn are compiled together, before anything is timed.
            shapes.compile([shape for _, shape in turn])
            for work, shape in turn:
                if not shapes.in_time():
                    return
                self._done += 1
                self._keep(work, shape, shapes.measure(shape))

    def _keep(
        self, work: _FamilyWork, shape: Shape, times: Mapping[Config, float | None] | None
    ) -> None:
        if times is None:
            return
        fine = {config: time for config, time in times.items() if time is not None}
        if shape.default in fine:
            work.times[shape.problem] = (shape.default, times)
            behind = fine[shape.default] / min(fine.values()) - 1
            told = f"{len(fine)} configs timed, the default {behind:.1%} behind the best"
        else:
            told = work.lost[shape.problem] = _NO_DEFAULT
        event = Event(
            kind="done",
            problem=shape.problem,
            index=self._done - 1,
            total_problems=self._total,
            best_us=min(fine.values(), default=None),
            message=told,
        )
        self._tell(event)

    def _conclude(self, work: _FamilyWork, reason: str) -> Generalised:
        """Choose a family's table from what was measured, and store it."""
        wanted, measured = len(work.shapes), len(work.times)
        for problem in work.shapes:
            if problem in self._unsettled:
                reason = f"{problem.name} {self._unsettled[problem]}; run it again to go on"
                break
        table = _table(self._run, work)
        if table is None:
            told = reason
            if work.lost:
                problem, why = next(iter(work.lost.items()))
                told = f"{problem.name}: {why}"
            return Generalised(
                family=work.family, status="invalid", table=None, measured=measured,
                wanted=wanted, reason=f"{FEWEST} shapes are needed ({told})",
            )  # fmt: skip
        self._run.database.set_table(table)
        complete = measured + len(work.lost) == wanted
        beaten = any(leaf.config is not None for leaf in table.leaves)
        return Generalised(
            family=work.family,
            status="partial" if not complete else "improved" if beaten else "unimproved",
            table=table,
            measured=measured,
            wanted=wanted,
            reason="" if complete else reason,
        )


def _table(run: Run, work: _FamilyWork) -> DispatchTable | None:
    """The table of a family from its measured shapes; None if they are too few."""
    if len(work.times) < FEWEST:
        return None
    # Every config that was timed anywhere: the winners first, so that of equals one of them serves.
    timed = [config for _, times in work.times.values() for config in sorted(times, key=_key)]
    configs = tuple(dict.fromkeys([*work.configs, *timed]))
    measured = [
        Probe(
            problem=problem,
            held_out=is_held_out(number),
            times_us=tuple(work.times[problem][1].get(config) for config in configs),
            default=configs.index(work.times[problem][0]),
        )
        for number, problem in enumerate(work.shapes)
        if problem in work.times
    ]
    if all(probe.held_out for probe in measured):
        return None
    known: dict[Config | None, int | None] = {None: None}
    known |= {config: index for index, config in enumerate(configs)}
    names = sorted({config.template for config in configs})
    return DispatchTable(
        device=run.device,
        family=work.family,
        policy=run.policy,
        digests={name: run.templates[name].digest for name in names},
        configs=configs,
        leaves=partition(measured),
        probes=tuple(measured),
        tuned=tuple((problem, known[config]) for problem, config in work.tuned if config in known),
        environment=dict(run.environment),
        created=now(),
    )


def _won_by_default(record: Record, run: Run) -> bool:
    """Whether a winner is what serves its problem without records: it speaks for the default."""
    templates = run.accepting(record.problem)
    return is_first_default(record.config, templates, record.problem, run.device)


def _key(config: Config) -> str:
    return config.key
