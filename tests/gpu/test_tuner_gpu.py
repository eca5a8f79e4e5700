"""The tuning loop on a GPU comes to a real winner; tests/faults has what goes wrong there."""

from __future__ import annotations

import pytest

from autoflash import device
from autoflash.codegen.catalog import installed
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning.tuner import tune

pytestmark = pytest.mark.gpu


def test_a_short_run_finds_a_config_no_slower_than_the_default() -> None:
    problem = Problem.parse("b2s2048h16d128c-bfloat16")
    templates = [t.name for t in installed().serving(problem, device.native())]
    assert templates
    with Database.open("sqlite://") as database:
        (result,) = tune(
            [problem], device.native(), database=database, effort="quick", max_trials=12
        )
        assert database.bests(device_key=device.native().key, pack=None) == [result.best]
    assert result.status in ("improved", "unimproved")
    assert result.best.latency_us <= result.best.default_us
    assert result.best.resources["registers"] > 0
