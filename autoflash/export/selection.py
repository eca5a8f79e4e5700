"""What is exported: the winners of one device that still hold, with what they render."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from autoflash.config import Config
from autoflash.device import Device
from autoflash.dispatch_table import DispatchTable
from autoflash.errors import InvalidInput
from autoflash.problem import Problem
from autoflash.record import Record

if TYPE_CHECKING:
    from autoflash.codegen.catalog import Catalog
    from autoflash.codegen.template import Source, Template
    from autoflash.database import Database


@dataclass(frozen=True)
class Entry:
    """What was learned, the template that it is of, and what that renders.

    Attributes:
        record: measured on the selection's device, or predicted for it.
        template: as installed; its digest is the record's.
        won: whether it is the winner of its problem. Else it is a trial: timed in the search, and
            never beside its rivals.
    """

    record: Record
    template: Template
    won: bool = True

    @property
    def problem(self) -> Problem:
        """What was tuned."""
        return self.record.problem

    @property
    def config(self) -> Config:
        """What won."""
        return self.record.config

    @cached_property
    def source(self) -> Source:
        """The kernel's source; entries whose kernels are the same have equal digests."""
        return self.template.render(self.config, self.problem, self.record.device)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The winners of one device, by problem, and what serves the shapes between them.

    Attributes:
        device: where all of it was measured, or what it was predicted for.
        entries: by problem name, one for each; at least one.
        tables: dispatch tables of which every template stands as it was measured.
        trials: for targets that need them: all trials of the entries' device by templates that
            stand as they were measured, in the order in which they were stored.
        left_out: why winners of this device are not among the entries -> how many.
    """

    device: Device
    entries: tuple[Entry, ...]
    tables: tuple[DispatchTable, ...] = ()
    trials: tuple[Entry, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def created(self) -> str:
        """When the newest of it was learned (UTC, ISO 8601): not when it is exported."""
        made = [entry.record.created for entry in (*self.entries, *self.trials)]
        return max([*made, *(table.created for table in self.tables)])


def select(
    db: Database,
    catalog: Catalog,
    *,
    templates: str,
    op: str | None = None,
    device_key: str | None = None,
    arch: str | None = None,
    stand_ins: bool = False,
    trials: bool = False,
    choose: Callable[[Sequence[Record]], Iterable[Record]] = tuple,
    chosen_tables: Callable[[Sequence[DispatchTable]], Iterable[DispatchTable]] = tuple,
) -> Selection:
    """The winners that a target can take.

    Args:
        db: where they are.
        catalog: the templates as installed; winners of other digests are left out.
        templates: glob of the names of templates that the target is for.
        op: of the problems, where those are foreign (Problem.is_foreign); None: none is.
        device_key: Device.key; with arch None, the only device that has winners is meant.
        arch: devices of this arch only.
        stand_ins: where no such winner holds, because another kind of kernel is faster or its
            template has changed, the fastest trial of these templates takes its place.
        trials: whether the selection holds the trials of its device, too.
        choose: keeps the records that were asked for.
        chosen_tables: likewise for dispatch tables.

    Raises:
        InvalidInput: nothing is left, or winners are of several devices and none was named.
    """
    current = {
        name: template.digest
        for name, template in catalog.templates.items()
        if fnmatch.fnmatchcase(name, templates)
    }

    def entry(record: Record, won: bool) -> Entry:
        return Entry(record, catalog.get(record.config.template), won)

    def of_op(record: Record) -> bool:
        return record.problem.op == op if op else not record.problem.is_foreign

    def tried(key: str | None) -> list[Record]:
        found = [r for name in current for r in db.trials(device_key=key, template=name)]
        return [
            record
            for record in choose(found)
            if of_op(record)
            and record.template_digest == current[record.config.template]
            and arch in (None, record.device.arch)
        ]

    best = db.bests(arch=arch, device_key=device_key)
    winners = [
        record
        for record in choose(best)
        if fnmatch.fnmatchcase(record.config.template, templates) and of_op(record)
    ]
    faults = [_fault(record, catalog) for record in winners]
    held = [record for record, fault in zip(winners, faults, strict=True) if fault is None]
    others = []
    if stand_ins:
        sound = [r for r in tried(device_key) if r.is_measured and _fault(r, catalog) is None]
        others = _fastest(sound, besides=held)
    wanted = [record.device for record in (*winners, *others)]
    if not wanted:
        raise _nothing(len(best), list(choose(best)), templates, op, db)
    device = _only_device(wanted)
    left_out = Counter(fault for fault in faults if fault is not None)
    if not held and not others:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in left_out.items())
        raise InvalidInput(f"no winner on {device.name} holds any more: {reasons}. Tune again.")
    entries = [*(entry(record, True) for record in held), *(entry(r, False) for r in others)]
    tables = [
        table
        for table in chosen_tables(db.tables(device.key))
        if all(current.get(name) == digest for name, digest in table.digests.items())
    ]
    return Selection(
        device=device,
        entries=tuple(sorted(entries, key=lambda each: each.problem.name)),
        tables=tuple(tables),
        trials=tuple(entry(r, False) for r in tried(device.key)) if trials else (),
        left_out=dict(left_out),
    )


def _fault(record: Record, catalog: Catalog) -> str | None:
    """Why a record is of no use with the templates as installed; None if it is."""
    name = record.config.template
    template = catalog.templates.get(name)
    if template is None or template.digest != record.template_digest:
        return f"{name} has changed since it was tuned"
    if (message := template.broken(record.config, record.problem, record.device)) is not None:
        return f'{name} has no such config any more, "{message}"'
    return None


def _fastest(trials: Sequence[Record], *, besides: Sequence[Record]) -> list[Record]:
    """The fastest of measured trials of each problem and device that is not among `besides`.

    Times of different policies are never compared: the policy of the newest trial counts.
    """
    has = {(record.problem, record.device.key) for record in besides}
    by_problem: dict[tuple[Problem, str], list[Record]] = {}
    for record in trials:
        if (place := (record.problem, record.device.key)) not in has:
            by_problem.setdefault(place, []).append(record)
    found = []
    for rivals in by_problem.values():
        policy = max(rivals, key=lambda record: record.created).policy
        timed = [record for record in rivals if record.policy == policy]
        # By key where times are equal: twins of one source have the time of the one that ran.
        found.append(min(timed, key=lambda record: (record.latency_us, record.config.key)))
    return found


def _only_device(devices: Iterable[Device]) -> Device:
    """The device that all of these are, or an InvalidInput that names them."""
    found = {device.key: device for device in devices}
    if len(found) == 1:
        return next(iter(found.values()))
    slugs = {device.slug for device in found.values()}
    # Two of one name differ in what a key has besides: cores or multiprocessors, instruction sets.
    names = slugs if len(slugs) == len(found) else set(found)
    raise InvalidInput(
        f"an export is for one device, and there are winners of {len(found)}: "
        f"{', '.join(sorted(names))}. Choose with --device NAME."
    )


def _nothing(
    count: int, chosen: Sequence[Record], templates: str, op: str | None, db: Database
) -> InvalidInput:
    """Why there is nothing to export, and what would make some.

    Args:
        count: winners of the devices that were asked for.
        chosen: those of them that the problem options keep.
        templates: as for `select`.
        op: likewise.
        db: likewise.
    """
    devices = sorted({f"{record.device.slug} ({record.device.arch})" for record in db.bests()})
    foreign = [record.problem.op for record in chosen if record.problem.is_foreign]
    if not count:
        why = "there are no winners of such a device"
    elif not chosen:
        why = f"of {count} winners none is of a problem that was asked for (`autoflash show`)"
    elif not op and len(foreign) == len(chosen):
        why = f"the winners asked for are of op {foreign[0]}: `autoflash export {foreign[0]}`"
    else:
        kind = f"op {op}" if op else f"a template like {templates!r}"
        why = f"of {len(chosen)} winners asked for none is of {kind}"
    how = f" --op {op}" if op else f" --templates {templates!r}" if templates != "*" else ""
    return InvalidInput(
        f"nothing to export: {why}. The database has winners of {', '.join(devices) or 'nothing'}. "
        f"`autoflash tune{how}` makes some."
    )
