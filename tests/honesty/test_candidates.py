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
    # Dropped from the race ("slow") is what a kernel as fast as the best may be on a busy machine.
    assert slow.outcome in ("ok", "slow"), slow.reason
    assert slow.latency_us < 3000 < result.best.default_us


def test_one_config_under_two_names_ties() -> None:
    # Equal but for a comment, so that both are compiled, run and timed on their own.
    names = config(delay_us=3000), config(delay_us=3000, name="b")
    tried = [dataclasses.replace(swept()[1][name], outcome="ok", reason="") for name in names]
    assert len({record.source_digest for record in tried}) == 2
    effort = dataclasses.replace(EFFORT, rounds=7, finals_ms=60.0)
    results = []
    for _ in range(2):  # one run of twenty may be mistaken, one of four hundred that both are
        with Database.open("sqlite://") as database:
            for record in tried:
                database.add(record)
            results += tune(
                [PROBLEM],
                device.for_arch("cpu"),
                database=database,
                effort=effort,
                catalog=catalog(),
                max_trials=2,
            )
    tie = next(result for result in results if result.status == "unimproved")
    assert tie.trials == 2
    assert tie.best.config == names[0]
    assert tie.best.default_us == tie.best.latency_us
