"""Under which conditions was it measured: versions, clocks, power, throttling?"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoflash.record import Record

READINGS = {"clock_mhz": "SM clock, MHz", "power_w": "board power, W", "temperature_c": "GPU, °C"}
"""Field of a Measurement -> what it is."""


@dataclass(frozen=True, slots=True)
class Spread:
    """What was read of one sensor, one value per trial."""

    count: int
    least: float
    p20: float
    median: float
    p80: float
    most: float


@dataclass(frozen=True, slots=True)
class Conditions:
    """Versions and the state of the device over all records of a chapter.

    Attributes:
        facts: name -> value -> records that have it.
        spreads: a key of READINGS -> its spread; without those that no record has.
        throttled: records timed while the driver gave a reason for a reduced clock.
        watched: records that tell.
        clocks: (number of the record from 1, MHz, whether throttled), in order.
    """

    facts: dict[str, Counter[str]]
    spreads: dict[str, Spread]
    throttled: int
    watched: int
    clocks: tuple[tuple[int, float, bool], ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, without the single clocks."""
        return {
            "environment": {name: dict(values) for name, values in self.facts.items()},
            "readings": {
                name: {"count": s.count, "least": s.least, "p20": s.p20, "median": s.median,
                       "p80": s.p80, "most": s.most}
                for name, s in self.spreads.items()
            },
            "throttled": self.throttled,
            "watched": self.watched,
        }  # fmt: skip


def conditions(records: Iterable[Record]) -> Conditions:
    """Those of the records, trials or winners, in the order in which they were timed."""
    facts: dict[str, Counter[str]] = {}
    readings: dict[str, list[float]] = {name: [] for name in READINGS}
    throttles: list[bool] = []
    clocks = []
    for number, record in enumerate(records, 1):
        for name, value in record.environment.items():
            facts.setdefault(name, Counter())[str(value)] += 1
        if (timed := record.measurement) is None:
            continue
        for name, found in readings.items():
            if (value := getattr(timed, name)) is not None:
                found.append(value)
        if timed.throttled is not None:
            throttles.append(timed.throttled)
        if timed.clock_mhz is not None:
            clocks.append((number, timed.clock_mhz, bool(timed.throttled)))
    spreads = {name: _spread(found) for name, found in readings.items() if found}
    return Conditions(facts, spreads, sum(throttles), len(throttles), tuple(clocks))


def _spread(values: list[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(
        len(ordered),
        ordered[0],
        ordered[round(0.2 * last)],
        statistics.median(ordered),
        ordered[round(0.8 * last)],
        ordered[-1],
    )
