"""Tables of trials with made-up times, for tests of replays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from autoflash.config import Config
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.tuning.table import Header, Row, Rung, Space, Table

PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")
TUNABLES = {"x": (0, 1, 2, 3, 4, 5, 6, 7), "y": (1, 2, 4, 8, 16), "z": (False, True)}


def point(x: int, y: int, z: bool = False) -> Config:
    return Config.of("made/up", {"x": x, "y": y, "z": z})


def row(
    config: Config, us: float | None = 100.0, outcome: str = "ok", source: str = "", **values: float
) -> Row:
    """Rungs of 0.01, 0.02 and 0.05 seconds; 1 s to compile, 0.1 to load and 0.2 to check."""
    rungs = () if us is None else tuple(Rung(us, us, us, 3, s) for s in (0.01, 0.02, 0.05))
    seconds = {"compile_s": 1.0, "load_s": 0.1, "check_s": 0.2, **values}
    return Row(config=config, outcome=outcome, source=source, rungs=rungs, **seconds)


def header(problem: Problem = PROBLEM, seeds: Iterable[Config] = (), jobs: int = 2) -> Header:
    space = Space(
        language="python", digest="0123", tunables=TUNABLES, default=point(7, 16),
        seeds=tuple(seeds), gives_way=False, feasible=80,
    )  # fmt: skip
    return Header(
        problem=problem, device=KNOWN_GPUS["sm90"], policy="made-up", timing_ms=50.0, jobs=jobs,
        sample="all", date="2026-11-21T00:00:00Z", environment={}, spaces={"made/up": space},
    )  # fmt: skip


def bowl(config: Config) -> float:
    """Fastest, 100, at x=2, y=4, z=True; the default takes 400."""
    x, y, z = config["x"], config["y"], config["z"]
    assert isinstance(x, int)
    assert isinstance(y, int)
    return 100.0 + 10 * (x - 2) ** 2 + 20 * (y.bit_length() - 3) ** 2 + (0 if z else 10)


def table(
    latency_us: Callable[[Config], float | None] = bowl,
    problem: Problem = PROBLEM,
    seeds: Iterable[Config] = (),
    jobs: int = 2,
) -> Table:
    """Every config of TUNABLES; where there is no latency the result was wrong."""
    configs = (
        Config.of("made/up", dict(zip(TUNABLES, values, strict=True)))
        for values in itertools.product(*TUNABLES.values())
    )
    rows = []
    for number, config in enumerate(configs):
        us = latency_us(config)
        outcome = "ok" if us is not None else "wrong_result"
        rows.append(row(config, us, outcome, source=f"kernel {number}"))
    return Table(header(problem, seeds, jobs), rows)
