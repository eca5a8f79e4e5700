"""Which tunables matter, and what does each of their values cost?"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autoflash.config import Config, Value
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.report.progress import TIMED

ENOUGH = 20
"""Timed trials from which importance is computed: the fastest tenth is two of them then."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """One tunable of a template of which several values were timed on one problem.

    Attributes:
        name: as declared.
        importance: its share, of 1 over all tunables, in what sets the fastest tenth of the trials
            apart (PED-ANOVA); None where there are fewer than ENOUGH trials.
        prices: value -> time of the best config with it over that of the best one of all:
            geometric mean over the problems that were tried both with it and without it.
    """

    name: str
    importance: float | None
    prices: dict[Value, float]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The tunables of one template, most important first.

    Attributes:
        template: its name.
        count: timed trials that this rests on.
        tunables: those of which a problem has seen several values.
    """

    template: str
    count: int
    tunables: tuple[Tunable, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "template": self.template,
            "trials": self.count,
            "tunables": [
                {"name": t.name, "importance": t.importance,
                 "prices": [{"value": v, "price": p} for v, p in t.prices.items()]}
                for t in self.tunables
            ],
        }  # fmt: skip


def tuned(trials: Iterable[Record]) -> tuple[Tuned, ...]:
    """Every template with timed trials of several configs, the most tried first."""
    by_template: dict[str, list[Record]] = {}
    for record in trials:
        if record.outcome in TIMED and record.latency_us:
            by_template.setdefault(record.config.template, []).append(record)
    found = [_tuned(template, records) for template, records in by_template.items()]
    return tuple(sorted((t for t in found if t.tunables), key=lambda t: -t.count))


def _tuned(template: str, records: Sequence[Record]) -> Tuned:
    # Template versions may differ in what they declare: what all of them have is compared.
    shared = set.intersection(*(set(record.config) for record in records))
    choices = {
        name: values
        for name in records[0].config
        if name in shared and len(values := _values(records, name)) > 1
    }
    importance: dict[str, float] = {}
    if choices and len(records) >= ENOUGH:
        from autoflash.tuning.sampler import importances

        importance = importances(
            choices,
            [(Config.of(template, {n: c[n] for n in choices}), r) for c, r in _ratios(records)],
        )
    tunables = [
        Tunable(name, importance.get(name), _prices(records, name, values))
        for name, values in choices.items()
    ]
    return Tuned(
        template,
        len(records),
        tuple(sorted((t for t in tunables if t.prices), key=_order)),
    )


def _order(tunable: Tunable) -> tuple[float, float]:
    dearest = max(tunable.prices.values(), default=1.0)
    return -(tunable.importance or 0.0), -dearest


def _values(records: Iterable[Record], name: str) -> list[Value]:
    values = {record.config[name] for record in records}
    return sorted(
        values, key=lambda v: (isinstance(v, str), v if not isinstance(v, str) else 0, str(v))
    )


def _ratios(records: Iterable[Record]) -> list[tuple[Config, float]]:
    """(config, its time over the best of its problem), so that problems can be put together."""
    timed = [(r.problem, r.config, r.latency_us) for r in records if r.latency_us]
    best: dict[Problem, float] = {}
    for problem, _, us in timed:
        best[problem] = min(us, best.get(problem, us))
    return [(config, us / best[problem]) for problem, config, us in timed]


def _prices(records: Iterable[Record], name: str, values: Sequence[Value]) -> dict[Value, float]:
    fastest: dict[Problem, dict[Value, float]] = {}
    for record in records:
        if us := record.latency_us:
            times = fastest.setdefault(record.problem, {})
            value = record.config[name]
            times[value] = min(us, times.get(value, us))
    compared = [times for times in fastest.values() if len(times) > 1]
    prices = {}
    for value in values:
        ratios = [times[value] / min(times.values()) for times in compared if value in times]
        if ratios:
            prices[value] = statistics.geometric_mean(ratios)
    return prices
