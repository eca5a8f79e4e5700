"""Why a problem is served as it is: the rule, the record, its rivals and what was ruled out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from autoflash.codegen import catalog
from autoflash.config import Config
from autoflash.device import Device, for_arch, native
from autoflash.dispatch_table import DispatchTable
from autoflash.problem import MAX_DISTANCE, Problem
from autoflash.record import Record
from autoflash.runtime import serving
from autoflash.runtime.dispatch import Dispatcher


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A record beside the problem asked about.

    Attributes:
        record: what was learned.
        distance: Problem.distance; infinite where no kernel fits both.
        differences: field -> (asked, recorded), of the problem's fields and "device".
        unusable: why it cannot stand in; None if it could.
    """

    record: Record
    distance: float
    differences: dict[str, tuple[Any, Any]]
    unusable: str | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; an infinite distance is None."""
        return {
            "record": self.record.to_dict(),
            "distance": self.distance if math.isfinite(self.distance) else None,
            "differences": {name: list(pair) for name, pair in self.differences.items()},
            "unusable": self.unusable,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """What serves a problem on a device, and what does not.

    Attributes:
        problem: what is asked.
        device: where.
        rule: "exact", "table", "bucket", "default" or "torch" (autoflash.runtime.dispatch).
        config: what serves; None for PyTorch.
        record: where the config was learned; None for tables, defaults and PyTorch.
        reason: one line saying why.
        next: (rule, config, reason) of what is tried where the kernel cannot be built.
        nearest: the nearest other records, nearest first.
        refused: template name -> why it does not accept the problem on this device, or which
            compiler this machine lacks for it.
        rejected: (record, reason) of records of the same kind that do not hold any more, or
            whose config is not feasible for this problem.
        table: the dispatch table that serves it; None where another rule does.
    """

    problem: Problem
    device: Device
    rule: str
    config: Config | None
    record: Record | None
    reason: str
    next: list[tuple[str, Config, str]]
    nearest: list[Neighbour]
    refused: dict[str, str]
    rejected: list[tuple[Record, str]]
    table: DispatchTable | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "problem": self.problem.to_dict(),
            "device": self.device.to_dict(),
            "rule": self.rule,
            "config": self.config.to_dict() if self.config else None,
            "record": self.record.to_dict() if self.record else None,
            "reason": self.reason,
            "next": [
                {"rule": rule, "config": config.to_dict(), "reason": reason}
                for rule, config, reason in self.next
            ],
            "nearest": [neighbour.to_dict() for neighbour in self.nearest],
            "refused": self.refused,
            "rejected": [
                {"record": record.to_dict(), "reason": reason} for record, reason in self.rejected
            ],
            "table": self.table.to_dict() if self.table else None,
        }


def explain(
    problem: Problem | str,
    device: Device | str | None = None,
    *,
    count: int = 5,
    dispatcher: Dispatcher | None = None,
) -> Explanation:
    """Say what serves a problem and why, without building anything.

    Args:
        problem: what is asked, or its name ("b1s4096h32/8d128c-bfloat16").
        device: where, or its arch ("sm90": the chip of autoflash.device.KNOWN_GPUS); None is the
            device found here. It need not be present.
        count: how many other records to list.
        dispatcher: asked instead of this process's own.

    Raises:
        InvalidInput: the name is not one of a problem.
        UnknownName: there is no such arch.
    """
    if isinstance(problem, str):
        problem = Problem.parse(problem)
    if isinstance(device, str):
        device = for_arch(device)
    asked = dispatcher or _dispatcher(device or native())
    choices = list(asked.choices(problem))
    first = choices[0] if choices else None
    index = asked.index
    others = [
        record
        for record in index.all
        if (first is None or record is not first.record)
        and record.problem.is_foreign == problem.is_foreign
    ]
    others.sort(key=lambda record: _unlikeness(problem, record))
    return Explanation(
        problem=problem,
        device=asked.device,
        rule=first.rule if first else "torch",
        config=first.config if first else None,
        record=first.record if first else None,
        reason=first.reason if first else asked.refusal(problem),
        next=[(choice.rule, choice.config, choice.reason) for choice in choices[1:]],
        nearest=[_neighbour(asked, problem, record) for record in others[:count]],
        refused={**asked.catalog.refusals(problem, asked.device), **asked.lacking(problem)},
        rejected=[
            *((r, why) for r, why in index.rejected if math.isfinite(problem.distance(r.problem))),
            *_infeasible(asked, problem),
        ],
        table=first.table if first else None,
    )


def _dispatcher(device: Device) -> Dispatcher:
    return Dispatcher(device, lambda: serving.stored(device), catalog.installed())


def _infeasible(asked: Dispatcher, problem: Problem) -> list[tuple[Record, str]]:
    near = (r for r in asked.index.all if problem.distance(r.problem) <= MAX_DISTANCE)
    reasons = ((record, asked.infeasible(record, problem)) for record in near)
    return [(record, reason) for record, reason in reasons if reason is not None]


def _neighbour(asked: Dispatcher, problem: Problem, record: Record) -> Neighbour:
    distance = problem.distance(record.problem)
    unusable = asked.infeasible(record, problem)
    if math.isinf(distance):
        unusable = "no kernel fits both problems"
    elif distance > MAX_DISTANCE:
        unusable = f"it is {distance:.3g} away; the limit is {MAX_DISTANCE:g}"
    return Neighbour(record, distance, _differences(problem, asked.device, record), unusable)


def _differences(problem: Problem, device: Device, record: Record) -> dict[str, tuple[Any, Any]]:
    found = {}
    for field in dataclasses.fields(problem):
        one, other = getattr(problem, field.name), getattr(record.problem, field.name)
        if one != other:
            found[field.name] = (one, other)
    if device.key != record.device.key:
        found["device"] = (device.key, record.device.key)
    return found


def _unlikeness(problem: Problem, record: Record) -> tuple[float, int, str]:
    """Sorts by distance; what is infinitely far, by the number of fields that differ."""
    fields = dataclasses.fields(problem)
    differing = sum(getattr(problem, f.name) != getattr(record.problem, f.name) for f in fields)
    return problem.distance(record.problem), differing, record.problem.name
