"""Budget: every problem gets its share of the time, on one device and on several."""

from __future__ import annotations

import math

import pytest

from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.tuning import budget
from autoflash.tuning.budget import Budget

PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    return clock


def make(
    count: int, devices: int, *, per_problem: float | None = None, in_all: float | None = None
) -> Budget:
    return Budget(
        [PROBLEM] * count, KNOWN_GPUS["sm90"], per_problem=per_problem, in_all=in_all,
        running=False, devices=devices,
    )  # fmt: skip


def test_one_device_has_the_time_in_turns(clock: Clock) -> None:
    shares = make(3, 1, in_all=90.0)
    assert shares.deadline(0) == pytest.approx(clock.now + 30)
    clock.now += 10  # it needed less: the others have the rest
    shares.finish(0)
    assert shares.deadline(1) == pytest.approx(clock.now + 40)


@pytest.mark.parametrize(("count", "each"), [(8, 45.0), (6, 45.0), (4, 90.0), (2, 90.0)])
def test_several_devices_share_it_at_once(clock: Clock, count: int, each: float) -> None:
    shares = make(count, 4, in_all=90.0)
    first = min(count, 4)
    for index in range(first):
        assert shares.deadline(index) == pytest.approx(clock.now + each)
    clock.now += each
    for index in range(first, count):
        shares.finish(index - first)
        assert shares.deadline(index) == pytest.approx(clock.now + 90.0 - each)


def test_time_for_each_problem_is_the_same_on_more_devices(clock: Clock) -> None:
    for devices in (1, 4):
        shares = make(6, devices, per_problem=10.0)
        assert shares.deadline(0) == pytest.approx(clock.now + 10)
        assert shares.deadline(1) == pytest.approx(clock.now + 10)


def test_a_problem_that_comes_back_is_not_counted_twice(clock: Clock) -> None:
    shares = make(2, 2, in_all=60.0)
    assert shares.deadline(0) == shares.deadline(1) == pytest.approx(clock.now + 60)
    clock.now += 20  # its device failed
    assert shares.deadline(0) == pytest.approx(clock.now + 40)


def test_no_limit_is_none(clock: Clock) -> None:
    assert make(3, 2, per_problem=None).deadline(1) == math.inf


def test_only_a_limit_for_all_can_be_spent(clock: Clock) -> None:
    soft, hard = make(2, 2, per_problem=10.0), make(2, 2, in_all=10.0)
    clock.now += 11
    assert not soft.is_spent()
    assert hard.is_spent()
