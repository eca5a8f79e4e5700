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
    """One winner: what was learned, the template that it is of, and what that renders.

    Attributes:
        record: measured on the selection's device, or predicted for it.
        template: as installed; its digest is the record's.
    """

    record: Record
    template: Template

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
        entries: by problem name; at least one.
        tables: dispatch tables of which every template stands as it was measured.
        left_out: why winners of this device are not among the entries -> how many.
    """

    device: Device
    entries: tuple[Entry, ...]
    tables: tuple[DispatchTable, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def created(self) -> str:
        """When the newest of it was learned (UTC, ISO 8601): not when it is exported."""
        made = [entry.record.created for entry in self.entries]
        return max([*made, *(table.created for table in self.tables)])


def select(
    db: Database,
    catalog: Catalog,
    *,
    templates: str,
    op: str | None = None,
    device_key: str | None = None,
    arch: str | None = None,
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
        choose: keeps the records that were asked for.
        chosen_tables: likewise for dispatch tables.

    Raises:
        InvalidInput: nothing is left, or winners are of several devices and none was named.
    """
    best = [r for r in db.bests(arch=arch, device_key=device_key)]
    wanted = [
        record
        for record in choose(best)
        if fnmatch.fnmatchcase(record.config.template, templates)
        and (record.problem.op == op if op else not record.problem.is_foreign)
    ]
    if not wanted:
        devices = sorted({r.device.slug for r in db.bests()})
        raise InvalidInput(
            f"of the {len(best)} best records none is of a template like {templates!r} and among "
            f"what was asked for. `autoflash show` lists them (devices: "
            f"{', '.join(devices) or 'none'}), and `autoflash tune{f' --op {op}' if op else ''}` "
            "makes them."
        )
    keys = {record.device.key: record.device for record in wanted}
    if len(keys) > 1:
        named = ", ".join(sorted({device.slug for device in keys.values()}))
        raise InvalidInput(
            f"an export is for one device, and there are winners of {len(keys)}: {named}. "
            "Choose with --device NAME."
        )
    (device,) = keys.values()
    left_out: Counter[str] = Counter()
    entries = []
    for record in sorted(wanted, key=lambda record: record.problem.name):
        template = catalog.templates.get(record.config.template)
        if template is None or template.digest != record.template_digest:
            left_out[f"{record.config.template} has changed since it was tuned"] += 1
        else:
            entries.append(Entry(record, template))
    if not entries:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in left_out.items())
        raise InvalidInput(f"no winner on {device.name} holds any more: {reasons}. Tune again.")
    current = {name: template.digest for name, template in catalog.templates.items()}
    tables = [
        table
        for table in chosen_tables(db.tables(device.key))
        if all(current.get(name) == digest for name, digest in table.digests.items())
        and all(fnmatch.fnmatchcase(name, templates) for name in table.digests)
    ]
    return Selection(
        device=device, entries=tuple(entries), tables=tuple(tables), left_out=dict(left_out)
    )
