"""Dispatcher: which kernel serves a Problem, by which rule, and the building of it.

In this order, the first that is feasible and can be built:

exact    the record of this very problem, measured on this very device;
table    what the dispatch table of its family has for such shapes, measured on this very device;
bucket   what the nearest record says (Problem.distance, at most MAX_DISTANCE): its config, or the
         default if that won there; of the records of this device, else of those measured on
         another device of this arch, else of those predicted for this arch;
default  the default config of a template that accepts the problem, in the order of FAMILIES;
torch    PyTorch's own attention (runtime/fallback.py).

Nothing here measures anything. A record holds while the digest of its template stands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from autoflash import build
from autoflash.build import Kernel
from autoflash.codegen.catalog import Catalog
from autoflash.codegen.defaults import Default, default_of, is_first_default, place
from autoflash.codegen.template import Source, Template
from autoflash.config import Config
from autoflash.device import Device
from autoflash.dispatch_table import DispatchTable, Family, by_family
from autoflash.errors import InvalidInput
from autoflash.problem import MAX_DISTANCE, Problem
from autoflash.record import Record
from autoflash.runtime import warn

T = TypeVar("T")

MOST_ANSWERS = 4096
"""Answers of templates kept; one that reads a sequence length makes a new one with every token."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A config that may serve a problem, and why it is considered.

    Attributes:
        rule: "exact", "table", "bucket" or "default".
        template: what the config is of.
        config: a feasible one.
        record: where it was learned; None for a table's and a default.
        reason: one line saying why this one.
        table: that it comes from.
    """

    rule: str
    template: Template
    config: Config
    record: Record | None
    reason: str
    table: DispatchTable | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What serves a problem.

    Attributes:
        problem: what was asked.
        rule: "exact", "table", "bucket", "default" or "torch".
        kernel: what runs; None where PyTorch does.
        config: of the kernel.
        record: where the config was learned; None for tables, defaults and PyTorch.
        reason: one line saying why.
        failures: what would have been better but cannot be built or launched, with the reason;
            each was told in a warning.
    """

    problem: Problem
    rule: str
    kernel: Kernel | None
    config: Config | None
    record: Record | None
    reason: str
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Index:
    """The records that may serve a device, and those that may not.

    Attributes:
        exact: measured on this device, by problem.
        groups: (tier, record) by what must be equal for a distance to be finite; tier 0 was
            measured on this device, 1 on another of its arch, 2 is predicted.
        all: every record that holds.
        rejected: (record, reason) of those that do not hold.
        tables: those of this device, by family.
    """

    exact: dict[Problem, Record]
    groups: dict[tuple[object, ...], list[tuple[int, Record]]]
    all: list[Record]
    rejected: list[tuple[Record, str]]
    tables: dict[Family, DispatchTable]


@dataclass(frozen=True, slots=True)
class Learned:
    """What tuning left for an arch.

    Attributes:
        records: winners.
        tables: what serves the shapes between them.
    """

    records: Iterable[Record] = ()
    tables: Iterable[DispatchTable] = ()


class Dispatcher:
    """Chooses and builds kernels for one device; safe to use from several threads.

    Args:
        device: where kernels run.
        records: what was learned, or a function that reads it, called on the first problem; it
            may give Learned, with tables beside the records.
        catalog: the templates.
        build_kernel: turns rendered source into a kernel on that device.
        missing: why a kernel is neither built nor can be built here, by its language, what renders
            its source, and the device; None if it can be had.
    """

    def __init__(
        self,
        device: Device,
        records: Iterable[Record] | Learned | Callable[[], Iterable[Record] | Learned],
        catalog: Catalog,
        build_kernel: Callable[[Source, Device], Kernel] = build.build,
        missing: Callable[[str, Callable[[], Source], Device], str | None] = build.missing,
    ) -> None:
        self.device = device
        self.catalog = catalog
        self._records = records
        self._build = build_kernel
        self._missing = missing
        self._lock = threading.RLock()
        self._index: Index | None = None
        # What a kernel is compiled for -> the kernel, or why there is none.
        self._kernels: dict[tuple[Config, tuple[object, ...]], Kernel | str] = {}
        # Likewise -> whether it lacks a compiler, and why.
        self._lacks: dict[tuple[Config, tuple[object, ...]], str | None] = {}
        # (template, config, what it sees of a problem) -> why it cannot serve, or its default.
        self._answers: dict[tuple[object, ...], object] = {}

    # Choosing -----------------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """The records, read on first use."""
        with self._lock:
            if self._index is None:
                found = self._records() if callable(self._records) else self._records
                learned = found if isinstance(found, Learned) else Learned(found)
                self._index = _index(learned, self.device, self.catalog)
            return self._index

    def reload(self) -> None:
        """Read the records again before the next choice; kernels stay built, failures do not."""
        with self._lock:
            self._index = None
            self._kernels = {k: v for k, v in self._kernels.items() if not isinstance(v, str)}
            self._lacks.clear()

    def after_fork(self) -> None:
        """Take a new lock: a thread of the parent process may have held the old one."""
        self._lock = threading.RLock()

    def choices(self, problem: Problem) -> Iterator[Choice]:
        """Every config worth building for a problem, best first; none means PyTorch."""
        if (learned := self._learned(problem)) is not None:
            yield learned
        yield from self._defaults(problem)

    def _defaults(self, problem: Problem) -> Iterator[Choice]:
        """The defaults of the templates that accept a problem, in order."""
        later: list[Choice] = []
        for template in sorted(self.catalog.templates.values(), key=place):
            found = self._default(template, problem)
            if found is None or self._lack(template, found.config, problem) is not None:
                continue
            choice = Choice("default", template, found.config, None, found.what)
            if found.gives_way:
                later.append(choice)
            else:
                yield choice
        yield from later

    def lacking(self, problem: Problem) -> dict[str, str]:
        """Template name -> the compiler it lacks, for those that would serve with their default."""
        found: dict[str, str] = {}
        for name, template in self.catalog.templates.items():
            default = self._default(template, problem)
            lack = default and self._lack(template, default.config, problem)
            if lack:
                found[name] = lack
        return found

    def _lack(self, template: Template, config: Config, problem: Problem) -> str | None:
        """Why a kernel cannot be had on this machine for want of a compiler; None if it can.

        Where there is none, a family that needs it stands back for the next without a warning:
        most machines have no nvcc, and lose nothing that they ever had.
        """
        key = (config, _traits(problem))
        if key not in self._lacks:
            render = partial(template.render, config, problem, self.device)
            try:
                self._lacks[key] = self._missing(template.language, render, self.device)
            except Exception:  # building it meets that again, and says so
                self._lacks[key] = None
        return self._lacks[key]

    def infeasible(self, record: Record, problem: Problem) -> str | None:
        """Why the config of a record that holds cannot serve `problem` here; None if it can."""
        return self._infeasible(self.catalog.get(record.config.template), record.config, problem)

    def _infeasible(self, template: Template, config: Config, problem: Problem) -> str | None:
        def ask() -> str | None:
            refusal = template.refusal(problem, self.device)
            return refusal or template.broken(config, problem, self.device)

        refusal = self._remembered(template, config, problem, ask)
        return refusal or self._lack(template, config, problem)

    def _default(self, template: Template, problem: Problem) -> Default | None:
        """What serves without a record; None if the template refuses."""

        def ask() -> Default | None:
            return default_of(template, problem, self.device)

        return self._remembered(template, None, problem, ask)

    def _remembered(
        self, template: Template, config: Config | None, problem: Problem, ask: Callable[[], T]
    ) -> T:
        """`ask()`, once for all problems that look the same to the template."""
        key = (template.name, config, template.decisive(problem, self.device))
        if key not in self._answers:
            if len(self._answers) >= MOST_ANSWERS:
                self._answers.clear()
            self._answers[key] = ask()
        return cast("T", self._answers[key])

    def _learned(self, problem: Problem) -> Choice | None:
        index = self.index
        record = index.exact.get(problem)
        if record is not None and self.infeasible(record, problem) is None:
            return self._choice(record, problem, 0.0)
        if (tabled := self._tabled(problem)) is not None:
            return tabled
        group = index.groups.get(_group(problem), [])
        distances = [problem.distance(record.problem) for _, record in group]
        ranked = sorted(
            (tier, distance, record.latency_us or 0.0, number)
            for number, ((tier, record), distance) in enumerate(zip(group, distances, strict=True))
            if distance <= MAX_DISTANCE
        )
        for _, distance, _, number in ranked:
            record = group[number][1]
            if self._won_by_default(record):
                default = next(self._defaults(problem), None)
                if default is not None:
                    return self._choice(record, problem, distance, default)
            elif self.infeasible(record, problem) is None:
                return self._choice(record, problem, distance)
        return None

    def _won_by_default(self, record: Record) -> bool:
        """Whether the winner is what serves its problem without records.

        Such a record speaks for the default, which looks at sizes: at b1s4096h8d128f the config of
        b4s4096h16d128f, tiles of 192 rows as the default there, takes 1.39 times as long as the
        default's tiles of 128 (NVIDIA H200).
        """
        key = ("default won", record.problem, record.device, record.config)
        if key not in self._answers:
            every = self.catalog.templates.values()
            self._answers[key] = is_first_default(
                record.config, every, record.problem, record.device
            )
        return bool(self._answers[key])

    def _tabled(self, problem: Problem) -> Choice | None:
        """What the family's table has for such a shape, if its leaf still holds.

        A leaf holds while what it serves is of a template that has not changed since: the table was
        made by comparing the one that there was. Where it does not, the next rules apply.
        """
        table = self.index.tables.get(Family.of(problem))
        leaf = None if table is None else table.leaf(problem)
        if table is None or leaf is None:
            return None
        config = table.config_of(leaf)
        if config is None:
            default = next(self._defaults(problem), None)
            if default is None:
                return None
            config = default.config
        template = self.catalog.templates.get(config.template)
        if template is None or not table.is_current(template.name, template.digest):
            return None
        if leaf.config is not None and self._infeasible(template, config, problem) is not None:
            return None
        what = "" if leaf.config is not None else ", where the default is best"
        reason = (
            f"dispatch table {table.family.name}: {leaf}{what}; {leaf.probes} shapes measured, "
            f"{leaf.mean:.1%} behind the best of each on average, {leaf.worst:.1%} at worst"
        )
        return Choice("table", template, config, None, reason, table)

    def _choice(
        self, record: Record, problem: Problem, distance: float, default: Choice | None = None
    ) -> Choice:
        how = "measured" if record.is_measured else "predicted"
        where = "this device" if record.device.key == self.device.key else record.device.name
        if record.problem == problem and record.device.key == self.device.key:
            rule, reason = "exact", f"{how} for this problem on this device"
        else:
            rule = "bucket"
            reason = f"nearest record: {record.problem.name}, {how} on {where}, {distance:.2g} away"
        if default is not None:
            reason += "; the default is best there"
            return Choice(rule, default.template, default.config, record, reason)
        return Choice(rule, self.catalog.get(record.config.template), record.config, record, reason)

    # Serving ------------------------------------------------------------------------------------

    def serve(self, problem: Problem, *, may_build: bool = True) -> Served:
        """The kernel for a problem, built if need be; falls through the rules, never raises.

        Args:
            problem: what is asked.
            may_build: False while a CUDA graph is captured: only what is in memory is used.
        """
        with self._lock:
            if not may_build and self._index is None:
                return Served(problem, "torch", None, None, None, _CAPTURE)
            failures: list[str] = []
            for choice in self.choices(problem):
                kernel = self._kernel(choice, problem, may_build)
                if kernel is None:
                    return Served(problem, "torch", None, None, None, _CAPTURE)
                if isinstance(kernel, Kernel):
                    return Served(
                        problem, choice.rule, kernel, choice.config, choice.record,
                        choice.reason, tuple(failures),
                    )  # fmt: skip
                failures.append(f"{choice.config.template} ({choice.config}): {kernel}")
        reason = "; ".join(failures) or self.refusal(problem)
        return Served(problem, "torch", None, None, None, reason, tuple(failures))

    def refusal(self, problem: Problem) -> str:
        """Why no template serves a problem on this device."""
        refused = {**self.catalog.refusals(problem, self.device), **self.lacking(problem)}
        listed = [f"{name} needs: {reason}" for name, reason in refused.items()]
        listed += [
            f"{template.name} has no feasible default or seed"
            for template in self.catalog.serving(problem, self.device)
            if template.name not in refused
        ]
        return "; ".join(listed) or "there are no templates"

    def gave_up(self, served: Served, reason: str) -> None:
        """Serve no more with a kernel that was built but could not be launched."""
        assert served.config is not None
        key = (served.config, _traits(served.problem))
        with self._lock:
            self._kernels[key] = reason
        _warn_of_failure(served.config, self.device, reason)

    def _kernel(self, choice: Choice, problem: Problem, may_build: bool) -> Kernel | str | None:
        """The kernel of a choice, or why there is none; None: it is to be built, but not now."""
        key = (choice.config, _traits(problem))
        known = self._kernels.get(key)
        if known is not None or not may_build:
            return known
        # Whatever goes wrong in making a kernel, PyTorch can still answer the call.
        try:
            source = choice.template.render(choice.config, problem, self.device)
            made: Kernel | str = self._build(source, self.device)
        except Exception as error:
            made = f"{type(error).__name__}: {str(error).strip()}"
            _warn_of_failure(choice.config, self.device, made)
        self._kernels[key] = made
        return made


_CAPTURE = "nothing can be built while a CUDA graph is captured; call autoflash.warmup before"


def _warn_of_failure(config: Config, device: Device, reason: str) -> None:
    warn.once(
        f"{config.template} ({config}) cannot be used on {device.name}: {reason}\n"
        "The call is served by the template's default or by PyTorch instead. "
        "`autoflash doctor` says whether a compiler is missing."
    )


def _index(learned: Learned, device: Device, catalog: Catalog) -> Index:
    exact: dict[Problem, Record] = {}
    groups: dict[tuple[object, ...], list[tuple[int, Record]]] = {}
    rejected: list[tuple[Record, str]] = []
    held: list[Record] = []
    for record in learned.records:
        if (reason := _stale(record, device, catalog)) is not None:
            rejected.append((record, reason))
            continue
        held.append(record)
        tier = 2 if not record.is_measured else 0 if record.device.key == device.key else 1
        groups.setdefault(_group(record.problem), []).append((tier, record))
        if tier == 0:
            rival = exact.get(record.problem)
            if rival is None or (record.latency_us or 0.0) < (rival.latency_us or 0.0):
                exact[record.problem] = record
    tables = by_family(table for table in learned.tables if table.device.key == device.key)
    return Index(exact, groups, held, rejected, tables)


def _stale(record: Record, device: Device, catalog: Catalog) -> str | None:
    """Why a record says nothing about kernels on this device today, or None."""
    if record.outcome not in ("ok", "predicted"):
        return f"its outcome is {record.outcome}"
    if record.device.arch != device.arch:
        return f"it is for {record.device.arch}"
    try:
        template = catalog.get(record.config.template)
    except InvalidInput as error:
        return str(error)
    if template.digest != record.template_digest:
        return (
            f"{template.name} has changed since: it was {record.template_digest}, "
            f"is now {template.digest}"
        )
    return None


def _traits(problem: Problem) -> tuple[object, ...]:
    """What a kernel is rendered for; another library's is compiled for its very sizes."""
    return (problem,) if problem.is_foreign else tuple(problem.traits.values())


def _group(problem: Problem) -> tuple[object, ...]:
    """What must agree for Problem.distance to be finite."""
    return (
        problem.op, problem.element_size, problem.head_dim, problem.head_dim_v, problem.causal,
        problem.local, problem.softcapped,
    )  # fmt: skip
