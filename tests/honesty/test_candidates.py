"""Kernels that win by not doing their work: real ones, built the normal way, on this CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from support.faults import EFFORT, PROBLEM, catalog, config, swept

from autoflash import device
from autoflash.config import Config
from autoflash.database import Database
from autoflash.record import Record
from autoflash.tuning.effort import Effort
from autoflash.tuning.tuner import TuneResult, tune

pytestmark = pytest.mark.slow

LIES = {
    "skip": "left unwritten",  # half of its rows
    "part": "left unwritten",  # half of each row
    "zeros": "should be",  # right only where all scores are equal
    "stale": "after timing",  # finds its answer of before in place
    "memo": "after timing",  # remembers it by the addresses of the question
    "once": "after timing",  # works only for its first calls
}


@pytest.mark.parametrize("lie", LIES)
def test_who_does_not_do_the_work_is_rejected(lie: str) -> None:
    _, last, _ = swept()
    record = last[config(lie)]
    assert record.outcome == "wrong_result"
    assert LIES[lie] in record.reason
    assert record.measurement is None


def trial_of(wanted: Config) -> Record:
    """Its trial in the sweep, as if nothing faster had been raced beside it."""
    return dataclasses.replace(swept()[1][wanted], outcome="ok", reason="")


def decided(records: Sequence[Record], effort: Effort) -> TuneResult:
    """What the finals say of configs of which the trials are stored."""
    with Database.open("sqlite://") as database:
        for record in records:
            database.add(record)
        (result,) = tune(
            [PROBLEM],
            device.for_arch("cpu"),
            database=database,
            effort=effort,
            catalog=catalog(),
            max_trials=len(records),
        )
    assert result.trials == len(records)
    return result


def test_a_slow_first_launch_does_not_lose() -> None:
    # Half a second, once; each call after it takes what the kernel without a delay takes.
    result, last, _ = swept()
    slow = last[config("slow_first")]
    # "slow" is what one may be that is as fast as the best, among many, on a busy machine.
    assert slow.outcome in ("ok", "slow"), slow.reason
    assert slow.latency_us < 3000 < result.best.default_us
    verdict = decided([trial_of(config(delay_us=3000)), trial_of(config("slow_first"))], EFFORT)
    assert verdict.status == "improved"
    assert verdict.best.config == config("slow_first")


def test_one_config_under_two_names_ties() -> None:
    # Equal but for a comment, so that both are compiled, run and timed on their own.
    names = config(delay_us=3000), config(delay_us=3000, name="b")
    tried = [trial_of(name) for name in names]
    assert len({record.source_digest for record in tried}) == 2
    effort = dataclasses.replace(EFFORT, rounds=7, finals_ms=60.0)
    # One run of twenty may be mistaken, one of four hundred that both are.
    results = [decided(tried, effort) for _ in range(2)]
    tie = next(result for result in results if result.status == "unimproved")
    assert tie.best.config == names[0]
    assert tie.best.default_us == tie.best.latency_us
