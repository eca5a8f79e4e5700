"""The template tests/data/plane, and workers that answer at once by the numbers in its source."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.workers import FakeWorkers

from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.tuner import TuneResult, tune

CATALOG = Catalog.load(Path(__file__).parents[1] / "data" / "plane")
GPU = KNOWN_GPUS["sm90"]
PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")
OTHER = Problem.parse("b2s2048h8d64c-bfloat16")
EFFORT = dataclasses.replace(EFFORTS["quick"], seconds=None, trials=100)
FEASIBLE = 39 + 5  # x + y < 11 leaves 39 of 40; x = 0 has twins

Reply = Mapping[str, Any]


def bowl(x: int, y: int) -> float:
    """Fastest at x=2, y=1."""
    return 100.0 + 10 * (x - 2) ** 2 + 10 * (y - 1) ** 2


class Workers(FakeWorkers):
    """Workers that answer at once, by the numbers in the source."""

    def __init__(self, latency_us: Callable[[int, int], float] = bowl, noise: float = 0.0) -> None:
        super().__init__()
        self.latency_us = latency_us
        self.noise = noise
        self.faults: dict[tuple[int, int], Reply] = {}
        self.compile_faults: dict[tuple[int, int], Reply] = {}
        self.resources: dict[tuple[int, int], Reply] = {}
        self.finals_faults: deque[Reply] = deque()
        self.hello_faults: deque[Reply] = deque()
        self.compiled: list[tuple[int, int]] = []
        self.evaluated: list[tuple[int, int]] = []
        self.on_evaluate: Callable[[], None] = lambda: None

    def hello(self, request: Reply) -> Reply:
        ok = {"outcome": "ok", "environment": {"torch": "pretended"}}
        return self.hello_faults.popleft() if self.hello_faults else ok

    def compile(self, request: Reply) -> Reply:
        point = at(request["source"])
        self.compiled.append(point)
        resources = {"compile_s": 0.5, "binary_bytes": 10, **self.resources.get(point, {})}
        return self.compile_faults.get(point, {"outcome": "ok", "resources": resources})

    def evaluate(self, request: Reply) -> Reply:
        self.on_evaluate()
        point = at(request["source"])
        self.evaluated.append(point)
        if point in self.faults:
            return self.faults[point]
        time = self.latency_us(*point)
        best = request["best_us"]
        outcome = "slow" if best is not None and time > 3 * best else "ok"
        return {"outcome": outcome, "measurement": measurement(time), "error_ratio": 0.5}

    def finals(self, request: Reply) -> Reply:
        if self.finals_faults:
            return self.finals_faults.popleft()
        times = {name: self.latency_us(*at(s)) for name, s in request["sources"].items()}
        times["cudnn"] = 150.0
        rounds = {
            name: [time * (1 + self.noise * (-1) ** (i + n)) for i in range(request["rounds"])]
            for n, (name, time) in enumerate(times.items())
        }
        measured = {name: measurement(time) for name, time in times.items()}
        return {"outcome": "ok", "measurements": measured, "rounds": rounds, "provider": "cudnn"}


def at(source: Mapping[str, Any]) -> tuple[int, int]:
    found = re.search(r"x=(\d+) y=(\d+)", source["text"])
    assert found
    return int(found[1]), int(found[2])


def measurement(time: float) -> dict[str, Any]:
    return {"latency_us": time, "p20_us": time, "p80_us": time, "count": 5}


def run(
    database: Database, workers: Workers, *problems: Problem, **options: Any
) -> list[TuneResult]:
    options = {"effort": EFFORT, "catalog": CATALOG, **options}
    return tune(problems or (PROBLEM,), GPU, database=database, workers=workers, **options)


def config(x: int, y: int, same: str = "a") -> Config:
    return Config.of("triton/plane", {"x": x, "y": y, "same": same})


def opened(catalog: Catalog = CATALOG) -> Database:
    """A database in memory that takes records of these templates for current."""
    digests = {name: template.digest for name, template in catalog.templates.items()}
    return Database.open("sqlite://", digests=digests)
