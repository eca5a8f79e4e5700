"""Workers that lie, stammer and die: what a run makes of them, on a pretended device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import PLANE as CATALOG
from support.faults import Tune

from autoflash import errors
from autoflash.config import Config
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.tuning import replies

PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")
THIRD = Problem.parse("b2s4096h8d64c-bfloat16")
OTHER = Problem.parse("b2s2048h8d64c-bfloat16")
DEFAULT, BEST = "6,3", "2,1"


def bowl(x: int, y: int) -> float:
    return 100.0 + 10 * (x - 2) ** 2 + 10 * (y - 1) ** 2


def point(record: Record) -> str:
    return f"{record.config['x']},{record.config['y']}"


def config(place: str) -> Config:
    x, y = (int(number) for number in place.split(","))
    return Config.of("triton/plane", {"x": x, "y": y, "same": "a"})


@pytest.fixture
def database() -> Iterator[Database]:
    digests = {name: template.digest for name, template in CATALOG.templates.items()}
    with Database.open("sqlite://", digests=digests) as opened:
        yield opened


def evaluated(tmp_path: Path, place: str) -> int:
    """How often a point was run."""
    path = tmp_path / f"evaluated-{place.replace(',', '-')}"
    return path.stat().st_size if path.exists() else 0


CRASH = {
    "0,0": ("nan", "a time of nan us"),
    "1,0": ("infinite", "a time of inf us"),
    "2,0": ("zero", "a time of 0.0 us"),
    "3,0": ("negative", "a time of -5.0 us"),
    "4,0": ("text", "cannot be meant"),
    "5,0": ("no_calls", "a time of 0 calls"),
    "6,0": ("odd_percentiles", "outside of its percentiles"),
    "7,0": ("no_time", "lacks 'measurement'"),
    "1,2": ("odd_outcome", "outcome 'splendid'"),
    "2,2": ("odd_error", "error 'KeyboardInterrupt'"),
    "3,2": ("odd_ratio", "error ratio of nan"),
    "4,2": ("garbage", "cannot be read"),
    "5,2": ("list", "cannot be read"),
    "6,2": ("deep", "cannot be read"),
    "7,2": ("huge", "cannot be read"),
    "1,3": ("half_and_dead", "killed by SIGKILL"),
    "2,3": ("twice", "more than its answer"),
    "3,3": ("other", "not asked"),
    "4,3": ("segfault", "killed by SIGSEGV"),
    "5,3": ("flood", "cannot be meant|cannot be read|more than its answer|outcome"),
}
TIMEOUT = {"1,1": "silent", "3,1": "half_and_hang"}


def test_what_a_worker_answers_wrongly_costs_one_trial_and_no_other(
    tuned: Tune, database: Database, tmp_path: Path
) -> None:
    faults = {place: fault for place, (fault, _) in CRASH.items()} | TIMEOUT | {"4,4": "late"}
    (result,) = tuned(faults)
    assert (result.status, result.best.config) == ("improved", config(BEST))
    last = {point(record): record for record in database.trials()}
    for place, (fault, reason) in CRASH.items():
        assert last[place].outcome == "crash", fault
        assert last[place].measurement is None
        assert re.search(reason, last[place].reason), (fault, last[place].reason)
        assert evaluated(tmp_path, place) in (1, 2)
    for place in TIMEOUT:
        assert last[place].outcome == "timeout"
        assert evaluated(tmp_path, place) == 1
    # All others have their own time, whoever ran before them.
    good = [record for record in last.values() if point(record) not in CRASH | TIMEOUT]
    assert len(good) == 39 - len(CRASH) - len(TIMEOUT)
    for record in good:
        x, y = (int(number) for number in point(record).split(","))
        assert (record.outcome, record.latency_us) == ("ok", bowl(x, y))
    assert database.runs()[0]["status"] == "done"


def test_a_fluke_is_not_believed(tuned: Tune, database: Database, tmp_path: Path) -> None:
    (result,) = tuned({BEST: ["segfault", 0, 1], DEFAULT: ["silent", 0, 1]})
    assert (result.status, result.best.config) == ("improved", config(BEST))
    assert result.best.default_us == bowl(6, 3)
    stories = [(point(r), r.outcome, r.reason) for r in database.trials() if r.reason]
    assert [story[:2] for story in stories] == [(DEFAULT, "timeout"), (BEST, "crash")]
    assert all(reason.startswith("to be run again: ") for _, _, reason in stories)
    assert evaluated(tmp_path, BEST) == evaluated(tmp_path, DEFAULT) == 2
    assert result.trials == len({record.config for record in database.trials()})


def test_a_second_chance_that_never_came_comes_in_the_next_run(
    tuned: Tune, database: Database, tmp_path: Path
) -> None:
    # The device is lost right after the first crash, before the second try.
    with pytest.raises(errors.WorkerError, match="SIGSEGV"):
        tuned({BEST: "segfault", "hello": ["segfault", 1, 99]})
    assert {r.outcome for r in database.trials() if point(r) == BEST} == {"crash"}
    (result,) = tuned({})
    assert (result.status, result.best.config) == ("improved", config(BEST))


def test_two_kills_bar_a_config_from_the_problems_that_follow(
    tuned: Tune, database: Database, tmp_path: Path
) -> None:
    results = tuned({"3,1": "silent"}, PROBLEM, OTHER, THIRD)
    assert [result.status for result in results] == ["improved"] * 3
    killers = [r for r in database.trials() if r.outcome == "timeout"]
    assert [(point(r), r.problem) for r in killers] == [("3,1", PROBLEM), ("3,1", OTHER)]
    assert evaluated(tmp_path, "3,1") == 2
    # And from those of a later run.
    fourth = Problem.parse("b2s512h8d64c-bfloat16")
    tuned({}, fourth)
    assert evaluated(tmp_path, "3,1") == 2


def test_a_default_is_never_barred(tuned: Tune, database: Database, tmp_path: Path) -> None:
    results = tuned({DEFAULT: "segfault"}, PROBLEM, OTHER, THIRD)
    assert [result.status for result in results] == ["improved"] * 3
    assert {result.best.default_us for result in results} == {None}
    assert evaluated(tmp_path, DEFAULT) >= 3


def test_a_device_that_fails_again_and_again_is_given_up_aloud(
    tuned: Tune, database: Database
) -> None:
    with pytest.raises(errors.WorkerError, match=r"3 fresh worker processes.*SIGSEGV.*is stored"):
        tuned({"hello": "segfault"})
    assert database.trials() == []


def test_who_crashes_only_in_the_finals_is_found_and_left_out(
    tuned: Tune, database: Database, tmp_path: Path
) -> None:
    # It passes its trial; in the finals, and alone after them, it does not.
    (result,) = tuned({f"finals-{BEST}": "segfault", BEST: ["segfault", 1, 99]})
    assert (result.status, result.best.latency_us) == ("improved", 110.0)  # the next best
    (failed,) = [record for record in database.trials() if record.outcome == "crash"]
    assert failed.config == config(BEST)
    assert failed.reason.startswith("in the finals: killed by SIGSEGV")
    (again,) = tuned({})
    assert again.best.config == result.best.config


def test_finals_that_fail_by_chance_are_held_again(tuned: Tune, database: Database) -> None:
    (result,) = tuned({f"finals-{BEST}": ["segfault", 0, 3]})
    assert (result.status, result.best.config) == ("improved", config(BEST))
    assert {record.outcome for record in database.trials()} == {"ok"}


@pytest.mark.parametrize(
    "answer",
    [
        {"rungs": [[float("nan"), 1.0, 1.0, 3, 0.1]]},
        {"rungs": [[5.0, 5.0, 5.0, 3, 0.1], [-1.0, 1.0, 1.0, 3, 0.1]]},
        {"rungs": [], "do_bench": [0.0, 0.1]},
        {"rungs": 7},
    ],
)
def test_a_survey_is_believed_only_with_times_that_can_be(answer: dict[str, object]) -> None:
    good = {"outcome": "ok", "rungs": [[5.0, 5.0, 5.0, 3, 0.1]], "do_bench": [5.0, 0.1]}
    assert replies.fault({"kind": "survey"}, good) is None
    assert "cannot be meant" in (replies.fault({"kind": "survey"}, {**good, **answer}) or "")
