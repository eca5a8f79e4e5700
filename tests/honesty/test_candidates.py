"""Kernels that win by not doing their work: real ones, built the normal way, on this CPU."""

from __future__ import annotations

import dataclasses

import pytest
from support.faults import EFFORT, PROBLEM, catalog, config, swept

from autoflash import device
from autoflash.database import Database
from autoflash.tuning.tuner import tune

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


def test_a_slow_first_launch_does_not_lose() -> None:
    # Half a second, once; each call after it takes what the kernel without a delay takes.
    result, last, _ = swept()
    slow = last[config("slow_first")]
    assert slow.outcome == "ok"
    assert slow.latency_us < 3000 < result.best.default_us


def test_one_config_under_two_names_ties() -> None:
    # Equal but for a comment, so that both are compiled, run and timed on their own.
    names = config(delay_us=3000), config(delay_us=3000, name="b")
    effort = dataclasses.replace(EFFORT, rounds=7, finals_ms=60.0)
    with Database.open("sqlite://") as database:
        swept_before = [each for each in swept()[2] if each.config in names]
        assert len({each.source_digest for each in swept_before}) == 2
        for record in swept_before:
            database.add(record)
        (result,) = tune(
            [PROBLEM],
            device.for_arch("cpu"),
            database=database,
            effort=effort,
            catalog=catalog(),
            max_trials=2,
        )
    assert (result.status, result.trials) == ("unimproved", 2)
    assert result.best.config == names[0]
    assert result.best.default_us == result.best.latency_us
