"""A pretended device for tests of faults: real processes, which answer by the numbers they read."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import PLANE, Tune, gone

from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.pool import Pool
from autoflash.tuning.tuner import Event, TuneResult, tune

DEVICE = Path(__file__).parent / "fake_device.py"
PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")
EFFORT = dataclasses.replace(EFFORTS["quick"], seconds=None, trials=100, evaluate_timeout_s=6.0)


@pytest.fixture
def tuned(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tune]:
    """Tunes with a pretended device that has these faults; no process of it is left."""
    pids: set[int] = set()

    def run(faults: dict, *problems: Problem, **options) -> list[TuneResult]:
        monkeypatch.setenv("FAKE_FAULTS", json.dumps(faults))
        monkeypatch.setenv("FAKE_STATE", str(tmp_path))
        command = (sys.executable, str(DEVICE))
        pool = Pool(jobs=1, cache_dir=tmp_path, visible=None, command=command)
        options = {"effort": EFFORT, "catalog": PLANE, "database": database} | options
        tell = options.pop("on_event", lambda event: None)

        def on_event(event: Event) -> None:
            pids.update(pool.pids())
            tell(event)

        gpu = KNOWN_GPUS["sm90"]
        return tune(problems or (PROBLEM,), gpu, workers=pool, on_event=on_event, **options)

    yield run
    assert all(gone(pid) for pid in pids)
