"""Compilers that several devices share: once each, fairly, and nothing for who wants no more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest

from autoflash.tuning.compilers import Compilers, Lane
from autoflash.tuning.pool import Finished


class Slots:
    """Workers that answer when they are told to."""

    def __init__(self) -> None:
        self.out: deque[tuple[str, str]] = deque()
        self.sent: list[str] = []
        self.closed = False

    def submit(self, role: str, key: str, request: Mapping[str, Any], timeout_s: float) -> None:
        self.out.append((role, key))
        self.sent.append(key)

    def pending(self, role: str) -> int:
        return sum(each == role for each, _ in self.out)

    def wait(self, timeout_s: float) -> list[Finished]:
        if not self.out:
            return []
        role, key = self.out.popleft()
        return [Finished(role, key, {"outcome": "ok", "of": key}, 2.0)]

    def cancel(self, role: str) -> list[str]:
        keys = [key for each, key in self.out if each == role]
        self.out.clear()
        return keys

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def slots() -> Slots:
    return Slots()


def make(slots: Slots, jobs: int, lanes: int) -> tuple[Compilers, list[Lane]]:
    compilers = Compilers(slots, jobs, {})
    return compilers, [Lane(Slots(), compilers, threading.Event()) for _ in range(lanes)]


def ask(lane: Lane, *keys: str) -> None:
    for key in keys:
        lane.submit("compile", key, {}, 9.0)


def received(lane: Lane) -> list[str]:
    return [finished.key for finished in lane.wait(0.0)] if lane.pending("compile") else []


def test_what_several_want_is_compiled_once(slots: Slots) -> None:
    compilers, (first, second, third) = make(slots, 4, 3)
    ask(first, "a", "b")
    ask(second, "b", "a")
    while compilers.serve(0.0):
        pass
    assert sorted(slots.sent) == ["a", "b"]
    assert sorted(received(first)) == sorted(received(second)) == ["a", "b"]
    ask(third, "a")  # compiled before
    (answer,) = third.wait(0.0)
    assert (answer.key, answer.reply) == ("a", {"outcome": "ok", "of": "a"})
    assert third.pending("compile") == 0
    assert not compilers.serve(0.0)


def test_no_more_are_sent_than_there_are_jobs(slots: Slots) -> None:
    compilers, (lane,) = make(slots, 2, 1)
    ask(lane, "a", "b", "c")
    compilers._send()
    assert slots.sent == ["a", "b"]
    compilers.serve(0.0)
    assert slots.sent == ["a", "b", "c"]


def test_a_lane_that_begins_is_not_last_in_line(slots: Slots) -> None:
    compilers, (busy, new) = make(slots, 2, 2)
    ask(busy, "a", "b", "c", "d", "e")
    compilers._send()
    ask(new, "x", "y")
    compilers.serve(0.0)
    compilers.serve(0.0)
    assert slots.sent[:4] == ["a", "b", "x", "c"]


def test_what_nobody_wants_any_more_is_not_compiled(slots: Slots) -> None:
    compilers, (first, second) = make(slots, 1, 2)
    ask(first, "a", "b", "c")
    ask(second, "c")
    compilers._send()
    assert sorted(first.cancel("compile")) == ["a", "b", "c"]
    assert first.pending("compile") == 0
    while compilers.serve(0.0):
        pass
    assert slots.sent == ["a", "c"]  # a was under way, c is wanted by the other
    assert received(second) == ["c"]
    assert received(first) == []


def test_an_answer_that_comes_after_it_was_forgotten_is_dropped(slots: Slots) -> None:
    compilers, (lane,) = make(slots, 1, 1)
    ask(lane, "a")
    compilers.serve(0.0)
    lane.cancel("compile")
    ask(lane, "b")
    compilers.serve(0.0)
    assert received(lane) == ["b"]


def test_a_lane_that_is_stopped_raises_as_ctrl_c_does(slots: Slots) -> None:
    stopped, runner = threading.Event(), Slots()
    lane = Lane(runner, Compilers(slots, 1, {}), stopped)
    lane.submit("device", "a", {}, 9.0)
    assert lane.pending("device") == 1
    stopped.set()
    with pytest.raises(KeyboardInterrupt):
        lane.wait(1.0)
    with pytest.raises(KeyboardInterrupt):
        lane.submit("device", "b", {}, 9.0)
    lane.close()
    assert runner.closed
    assert runner.sent == ["a"]
