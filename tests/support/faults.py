"""What do tests of faults and of honesty share? Templates with faults to order, runs, processes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.problem import Problem
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.process import family

if TYPE_CHECKING:
    from autoflash.record import Record
    from autoflash.tuning.progress import TuneResult

TEMPLATES = Path(__file__).parents[1] / "faults" / "templates"
PLANE = Catalog.load(Path(__file__).parents[1] / "data" / "plane")
Tune = Callable[..., "list[TuneResult]"]
"""Tunes with a pretended device: faults first, then problems and options of `tune`."""
PROBLEM = Problem.parse("b1s48h2/2d16c-float32")
EFFORT = dataclasses.replace(
    EFFORTS["quick"],
    trials=100,
    seconds=None,
    evaluate_timeout_s=9.0,
    timing_ms=5.0,
    finals_ms=5.0,
)


def catalog() -> Catalog:
    return Catalog.load(TEMPLATES)


def config(fault: str = "none", delay_us: int = 0, twin: int = 0, name: str = "a") -> Config:
    """A config of cpp/naive; the default takes 3 ms a call."""
    tunables = {"delay_us": delay_us, "fault": fault, "twin": twin, "name": name}
    return Config.of("cpp/naive", tunables)


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process, its session and all below it are gone in time."""
    limit = time.monotonic() + within_s
    while family(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    return not family(pid)


def died(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process is dead in time: one that was killed may take a moment to end."""
    limit = time.monotonic() + within_s
    while lives(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    return not lives(pid)


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie: what its parent has not noticed yet is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z"


def children(pid: int) -> list[int]:
    """Processes with this parent, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@cache
def swept() -> tuple[TuneResult, dict[Config, Record], tuple[Record, ...]]:
    """A run over every config of cpp/naive, on this CPU: result, last record of each, all."""
    from autoflash import device
    from autoflash.database import Database
    from autoflash.tuning.tuner import tune

    with Database.open("sqlite://") as database:
        (result,) = tune(
            [PROBLEM], device.for_arch("cpu"), database=database, effort=EFFORT, catalog=catalog()
        )
        records = tuple(database.trials())
        assert database.runs()[0]["status"] == "done"
    return result, {record.config: record for record in records}, records
