"""Does luck win? The rule of the finals on noise: synthetic, and recorded from this kind of CPU."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.tuning import finals
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.pool import Finished
from autoflash.tuning.run import Run
from autoflash.tuning.timing import Interleaved

CATALOG = Catalog.load(Path(__file__).parents[1] / "data" / "plane")
RECORDED = json.loads((Path(__file__).parent / "noise-cpu.json").read_text())
PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")
RUNS = 400
MOST = int(0.05 * RUNS + 2 * math.sqrt(RUNS * 0.05 * 0.95))
"""Of so many runs as may have a winner by chance: 5%, and two standard deviations."""

Draw = Callable[[random.Random, int, int], list[list[float]]]
"""Medians of each round, for so many entrants that are all equally fast, in so many rounds."""


def steady(draw: random.Random, entrants: int, rounds: int) -> list[list[float]]:
    """Rounds that differ by 30% and entrants within them by 2%."""
    shared = [draw.lognormvariate(0, 0.3) for _ in range(rounds)]
    return [[100 * s * draw.lognormvariate(0, 0.02) for s in shared] for _ in range(entrants)]


def bursts(draw: random.Random, entrants: int, rounds: int) -> list[list[float]]:
    """One turn in ten is disturbed by something that doubles it."""
    return [
        [
            100 * draw.lognormvariate(0, 0.01) * (2 if draw.random() < 0.1 else 1)
            for _ in range(rounds)
        ]
        for _ in range(entrants)
    ]


def drift(draw: random.Random, entrants: int, rounds: int) -> list[list[float]]:
    """The clock falls from turn to turn, whoever has it."""
    medians: list[list[float]] = [[0.0] * rounds for _ in range(entrants)]
    pace = 1.0
    for number in range(rounds):
        for entrant in draw.sample(range(entrants), entrants):
            pace *= 1 + 0.004 * draw.random()
            medians[entrant][number] = 100 * pace * draw.lognormvariate(0, 0.01)
    return medians


def recorded(draw: random.Random, entrants: int, rounds: int) -> list[list[float]]:
    """One kernel under nine names, on a CPU that others use too."""
    session = draw.choice(RECORDED["sessions"])
    names = draw.sample(range(len(session)), entrants)
    first = draw.randrange(len(session[0]) - rounds + 1)
    return [session[name][first : first + rounds] for name in names]


class Noisy:
    """A worker whose finals are nothing but noise around the same time."""

    def __init__(self, draw: random.Random, noise: Draw, speed: float = 1.0) -> None:
        self.draw, self.noise, self.speed = draw, noise, speed
        self._answers: list[Finished] = []

    def submit(self, role: str, key: str, request: Any, timeout_s: float) -> None:
        names = list(request["sources"])
        medians = self.noise(self.draw, len(names), request["rounds"])
        rounds = dict(zip(names, medians, strict=True))
        rounds["0"] = [time_us * self.speed for time_us in rounds["0"]]
        measured = {name: _measurement(times) for name, times in rounds.items()}
        reply = {"outcome": "ok", "measurements": measured, "rounds": rounds, "provider": None}
        self._answers.append(Finished(role, key, reply, 0.1))

    def wait(self, timeout_s: float) -> list[Finished]:
        answers, self._answers = self._answers, []
        return answers

    def pending(self, role: str) -> int:
        return len(self._answers)


def _measurement(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    time_us = ordered[len(ordered) // 2]
    return {"latency_us": time_us, "p20_us": ordered[0], "p80_us": ordered[-1], "count": 5}


def improvements(
    database: Database, noise: Draw, effort: str, entrants: int, speed: float = 1.0
) -> int:
    """How often of RUNS the finals of a default and so many others name a winner."""
    draw = random.Random(f"{noise.__name__} {effort} {entrants}")
    template = CATALOG.get("triton/plane")
    gpu = KNOWN_GPUS["sm90"]
    configs = [Config.of("triton/plane", {"x": x, "y": 2, "same": "a"}) for x in range(entrants)]
    default = template.default_config(PROBLEM, gpu)
    workers = Noisy(draw, noise, speed)
    run = Run(
        templates=CATALOG.templates, device=gpu, database=database, workers=workers,
        effort=EFFORTS[effort], policy="pretended", jobs=1, seed=0,
    )  # fmt: skip
    measured = Measurement(latency_us=100.0, p20_us=100.0, p80_us=100.0, count=5)
    records: list[Record] = [
        run.record(PROBLEM, each, "ok", measurement=measured) for each in [*configs, default]
    ]
    found = 0
    for _ in range(RUNS):
        verdict = finals.decide(run, PROBLEM, records, [default], None)
        assert len(verdict.finalists) == entrants + 1
        found += verdict.improved
    return found


@pytest.fixture
def database() -> Database:
    with Database.open("sqlite://") as opened:
        yield opened


@pytest.mark.parametrize("noise", [steady, bursts, drift, recorded])
@pytest.mark.parametrize("effort", list(EFFORTS))
def test_equals_have_no_winner_in_19_runs_of_20(
    database: Database, noise: Draw, effort: str
) -> None:
    entrants = EFFORTS[effort].finalists
    assert improvements(database, noise, effort, entrants) <= MOST


@pytest.mark.parametrize("noise", [steady, bursts, drift, recorded])
def test_default_against_default_has_no_winner(database: Database, noise: Draw) -> None:
    assert improvements(database, noise, "normal", 1) <= MOST


@pytest.mark.parametrize("effort", list(EFFORTS))
def test_whoever_is_a_tenth_faster_wins_all_the_same(database: Database, effort: str) -> None:
    entrants = EFFORTS[effort].finalists
    assert improvements(database, steady, effort, entrants, speed=0.9) > 0.9 * RUNS


@pytest.mark.parametrize("noise", [steady, bursts, drift, recorded])
def test_one_call_under_two_names_ties_within_the_interval(noise: Draw) -> None:
    draw = random.Random(1)
    inside = 0
    for _ in range(RUNS):
        a, b = noise(draw, 2, 9)
        found = Interleaved({}, {"a": a, "b": b}).compare("a", "b")
        inside += found.low <= 1 <= found.high
    # Each end is exceeded in at most one run of twenty.
    assert inside >= RUNS - 2 * 0.05 * RUNS - 2 * math.sqrt(RUNS * 0.1 * 0.9)
