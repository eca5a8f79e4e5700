"""Kernels that poison their context, hang, starve and lie: real ones, on the GPU found here.

About ten worker processes are lost and replaced, which takes most of the time.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
from support.faults import catalog

from autoflash import build, device
from autoflash.config import Config
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.progress import TuneResult
from autoflash.tuning.tuner import tune

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PROBLEM = Problem.parse("b1s256h4/2d64c-float16")
EFFORT = dataclasses.replace(EFFORTS["quick"], seconds=None, trials=100, evaluate_timeout_s=20.0)


def triton(fault: str, block_n: int = 16) -> Config:
    return Config.of("triton/row", {"block_n": block_n, "fault": fault})


def cuda(fault: str) -> Config:
    return Config.of("cuda/row", {"fault": fault})


@cache
def swept() -> tuple[TuneResult, dict[Config, Record]]:
    """A run over every config of both templates: result, last record of each."""
    with Database.open("sqlite://") as database:
        (result,) = tune(
            [PROBLEM], device.native(), database=database, effort=EFFORT, catalog=catalog()
        )
        assert database.runs()[0]["status"] == "done"
        return result, {record.config: record for record in database.trials()}


FAULTS = {
    triton("illegal"): (("runtime_error",), ""),
    triton("spin"): (("timeout",), "no answer"),
    triton("skip"): (("wrong_result",), "left unwritten"),
    cuda("misaligned"): (("runtime_error",), ""),
    cuda("assert"): (("runtime_error",), ""),
    cuda("trap"): (("runtime_error",), ""),
    cuda("huge"): (("runtime_error",), "out of memory"),
    cuda("leak"): (("runtime_error",), "memory"),
    cuda("part"): (("wrong_result",), "left unwritten"),
    cuda("stale"): (("wrong_result",), "after timing"),
    cuda("once"): (("wrong_result",), "after timing"),
}


def needs_nvcc(config: Config) -> None:
    if config.template == "cuda/row" and (reason := build.unavailable("cuda")):
        pytest.skip(reason)


@pytest.mark.parametrize("config", FAULTS, ids=lambda config: config.key)
def test_a_fault_is_stored_with_its_outcome_and_reason(config: Config) -> None:
    needs_nvcc(config)
    record = swept()[1][config]
    outcomes, reason = FAULTS[config]
    assert record.outcome in outcomes, record.reason
    assert reason in record.reason


@pytest.mark.parametrize(
    "config", [triton("none"), triton("none", 64), cuda("none"), cuda("slow_first")],
    ids=lambda config: config.key,
)  # fmt: skip
def test_those_that_come_after_a_fault_are_timed_as_ever(config: Config) -> None:
    needs_nvcc(config)
    record = swept()[1][config]
    assert record.outcome in ("ok", "slow"), record.reason
    # These kernels take tens of microseconds; a first launch of half a second is in no time.
    assert 1 < record.latency_us < 20_000


def test_a_slow_first_launch_does_not_lose() -> None:
    needs_nvcc(cuda("none"))
    _, last = swept()
    slow, usual = last[cuda("slow_first")], last[cuda("none")]
    assert slow.latency_us < 2 * usual.latency_us
    assert usual.latency_us < 2 * slow.latency_us


def test_the_run_ends_with_a_winner() -> None:
    result, _ = swept()
    assert result.status in ("improved", "unimproved")
    assert result.best.config in (
        triton("none"), triton("none", 64), cuda("none"), cuda("slow_first"),
    )  # fmt: skip
    assert result.best.torch_us
    assert result.best.environment["driver"]
