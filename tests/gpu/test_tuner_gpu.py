"""The tuning loop on a GPU: a poisoned context, a kernel that never ends, and a real winner."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autoflash import device
from autoflash.codegen.catalog import Catalog, installed
from autoflash.config import Config
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.tuner import tune

pytestmark = pytest.mark.gpu

FAULTY = Catalog.load(Path(__file__).parents[1] / "faults" / "templates")


def test_a_poisoned_context_and_a_hang_cost_one_trial_each() -> None:
    effort = dataclasses.replace(EFFORTS["quick"], seconds=None, evaluate_timeout_s=30.0)
    problem = Problem.parse("b1s256h4/2d64c-float16")
    with Database.open("sqlite://") as database:
        (result,) = tune(
            [problem], device.native(), database=database, effort=effort, catalog=FAULTY
        )
        records = {record.config: record for record in database.trials()}

    def outcome(fault: str, block_n: int = 16) -> str:
        record = records[Config.of("triton/row", {"block_n": block_n, "fault": fault})]
        return record.outcome

    assert outcome("none") == "ok"
    assert outcome("none", 64) in ("ok", "slow")
    assert outcome("illegal") == "runtime_error"
    assert outcome("spin") == "timeout"
    assert outcome("skip") == "wrong_result"
    assert result.status in ("improved", "unimproved")
    assert result.best.torch_us
    assert result.best.environment["driver"]


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
