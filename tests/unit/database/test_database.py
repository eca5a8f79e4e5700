"""Whether trials, runs and winners are stored, found and judged as they should be."""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.errors import DatabaseError, InvalidInput, UnknownName
from autoflash.problem import Problem
from autoflash.record import OUTCOMES, Measurement, Record

Make = Callable[..., Record]


def raw(url: str) -> sqlite3.Connection:
    return sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)


def test_a_trial_comes_back_equal_in_every_field(database: Database, record: Make) -> None:
    stored = record(
        measurement=Measurement(
            latency_us=12.5, p20_us=12.25, p80_us=13.0, count=99, clock_mhz=1980.0, throttled=False
        ),
        default_us=20.0,
        torch_us=15.0,
        torch_provider="cudnn",
        error_ratio=0.75,
        source_digest="abc",
        reason="größer \u2028 als\nerlaubt",
    )
    database.add(stored)
    assert database.trials() == [stored]


@pytest.mark.parametrize("outcome", sorted(OUTCOMES))
def test_every_outcome_is_stored(database: Database, record: Make, outcome: str) -> None:
    database.add(record(outcome=outcome, reason="why"))
    assert [trial.outcome for trial in database.trials(outcome=outcome)] == [outcome]


def test_what_json_cannot_say_becomes_null(database: Database, record: Make) -> None:
    database.add(record(outcome="wrong_result", error_ratio=math.nan, reason="half a \udcff pair"))
    [trial] = database.trials()
    assert trial.error_ratio is None
    assert trial.reason == "half a ? pair"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcome": "fine"}, "outcome 'fine'"),
        ({"measurement": None}, "latency of None"),
        ({"latency_us": math.nan}, "latency of nan"),
        ({"latency_us": -1.0}, "latency of -1.0"),
        ({"outcome": "predicted", "predicted_us": math.inf}, "latency of inf"),
        ({"created": "yesterday"}, "yesterday"),
        ({"environment": {"path": Path("/")}}, "JSON"),
    ],
)
def test_a_record_that_cannot_be_meant_is_refused(
    database: Database, record: Make, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        database.add(record(**changes))
    assert database.trials() == []


def test_the_same_record_is_stored_once(database: Database, record: Make) -> None:
    database.add(record())
    database.add(record())
    database.add(record(latency_us=101.0))
    assert len(database.trials()) == 2


def test_a_record_without_a_moment_gets_one_in_utc(database: Database, record: Make) -> None:
    database.add(record(created=""))
    assert database.trials()[0].created.endswith("+00:00")


def test_trials_are_found_by_every_kind_of_column(database: Database, record: Make) -> None:
    other = record(
        "b1s100x200h4d64fw7x9cap30-float16",
        outcome="timeout",
        device=KNOWN_GPUS["sm80"],
        policy="other",
        config=Config.of("cpp/fwd", {"block_m": 8}),
        template_digest="c1",
    )
    database.add(record())
    database.add(other)
    for wanted in (
        {"problem": other.problem},
        {"device_key": other.device.key},
        {"policy": "other"},
        {"template": "cpp/fwd"},
        {"template_digest": "c1"},
        {"dtype": "float16"},
        {"head_dim": 64},
        {"seqlen_q": 100, "seqlen_k": 200},
        {"num_kv_heads": 4},
        {"causal": False},
        {"arch": "sm80"},
        {"outcome": "timeout"},
        {"latency_us": None},
        {"config": 'cpp/fwd{"block_m":8}'},
        {"window_left": 7, "window_right": 9},
        {"softcap": 30.0},
    ):
        assert database.trials(**wanted) == [other], wanted
    assert database.trials(problem=other.problem, policy="none such") == []


def test_an_unknown_column_is_named(database: Database) -> None:
    with pytest.raises(UnknownName, match=r"'headdim'.*'head_dim'"):
        database.trials(headdim=64)


def test_a_run_has_a_beginning_and_an_end(database: Database, record: Make) -> None:
    first = database.start_run(
        command="autoflash tune",
        device=KNOWN_GPUS["sm90"],
        environment={"torch": "2.13.0"},
        seed=7,
        budget={"max_seconds": 60},
    )
    database.add(record(), run=first)
    [row] = database.runs()
    assert (row["status"], row["ended"], row["seed"]) == ("running", None, 7)
    assert json.loads(row["budget"]) == {"max_seconds": 60}
    database.finish_run(first, "done")
    [row] = database.runs()
    assert row["status"] == "done"
    assert row["ended"] >= row["started"]
    assert database.trials(run=first) == [record()]


def test_an_unknown_run_is_an_error(database: Database, record: Make) -> None:
    with pytest.raises(InvalidInput, match="no run 17"):
        database.finish_run(17, "done")
    with pytest.raises(DatabaseError, match="run that is not in this database"):
        database.add(record(), run=17)
    assert database.trials() == []


@pytest.mark.sqlite
def test_a_row_that_does_not_parse_is_a_miss(database: Database, url: str, record: Make) -> None:
    for number in range(4):
        database.add(record(latency_us=10.0 + number))
    for name in ("b1s1h1d64f", "b1s2h1d64f"):
        database.set_best(record(name))
    with raw(url) as connection:
        connection.execute("UPDATE trial SET record = '{' WHERE id = 1")
        connection.execute("UPDATE trial SET record = '{\"problem\": 3}' WHERE id = 2")
        connection.execute(
            "UPDATE trial SET record = replace(record, '\"ok\"', '\"odd\"') WHERE id = 3"
        )
        connection.execute("UPDATE best SET record = X'00ff' WHERE problem LIKE 'b1s1h%'")
    connection.close()
    with pytest.warns(RuntimeWarning, match="table trial does not parse") as warned:
        assert database.trials() == [record(latency_us=13.0)]
    assert len(warned) == 1
    assert len(database.trials()) == 1  # and no second warning
    with pytest.warns(RuntimeWarning, match="table best does not parse"):
        assert database.bests() == [record("b1s2h1d64f")]
    assert database.skipped == {"trial": 3, "best": 1}
    # What does not parse stands in nobody's way.
    assert database.set_best(record("b1s1h1d64f", outcome="predicted"))


def test_threads_may_share_a_database(database: Database, record: Make) -> None:
    def add(start: int) -> None:
        for number in range(20):
            database.add(record(latency_us=start + number))

    threads = [threading.Thread(target=add, args=(1 + 1000 * each,)) for each in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(database.trials()) == 80


# Winners ------------------------------------------------------------------------------------------

EARLIER, LATER = "2026-11-20T10:00:00+00:00", "2026-11-22T01:00:00+02:00"


@pytest.mark.parametrize(
    ("old", "new", "stored"),
    [
        ({}, {"created": LATER, "latency_us": 120.0}, True),
        ({}, {}, True),
        ({}, {"created": EARLIER, "latency_us": 80.0}, False),
        ({}, {"created": LATER, "outcome": "predicted", "latency_us": 1.0}, False),
        ({"outcome": "predicted"}, {"created": EARLIER}, True),
        ({"outcome": "predicted"}, {"created": LATER, "outcome": "predicted"}, True),
        # Of a template that changed since: worth less than a prediction.
        ({"template_digest": "d0"}, {"outcome": "predicted"}, True),
        # Of a template that no longer exists.
        ({"config": Config.of("gone", {})}, {"created": EARLIER, "outcome": "predicted"}, True),
        # Of another template that did not change.
        (
            {"config": Config.of("cpp/fwd", {}), "template_digest": "c1"},
            {"created": LATER, "outcome": "predicted"},
            False,
        ),
        # The template edited a moment ago is the current one, whatever was installed.
        ({}, {"template_digest": "d2", "outcome": "predicted"}, True),
    ],
)
def test_which_of_two_winners_stays(
    database: Database,
    record: Make,
    old: dict[str, object],
    new: dict[str, object],
    stored: bool,
) -> None:
    first, second = record(**old), record(**new)
    assert database.set_best(first)
    assert database.set_best(second) is stored
    assert database.bests() == [second if stored else first]


def test_winners_are_kept_per_problem_and_device(database: Database, record: Make) -> None:
    a100 = KNOWN_GPUS["sm80"]
    h20 = dataclasses.replace(KNOWN_GPUS["sm90"], name="NVIDIA H20", num_sms=78)
    for each in (
        record(),
        record("b1s1h1d64f"),
        record(device=a100),
        record(device=h20),
    ):
        assert database.set_best(each)
    assert len(database.bests()) == 4
    assert database.bests(device_key=a100.key) == [record(device=a100)]
    assert {best.device for best in database.bests(arch="sm90")} == {KNOWN_GPUS["sm90"], h20}
    assert database.bests(arch="sm90", head_dim=64) == [record("b1s1h1d64f")]
    assert database.bests(pack=None) == database.bests()


def test_a_failure_cannot_win(database: Database, record: Make) -> None:
    with pytest.raises(InvalidInput, match="'timeout' cannot be a winner"):
        database.set_best(record(outcome="timeout"))


def test_the_installed_catalog_says_which_templates_are_current(url: str, record: Make) -> None:
    from autoflash.codegen import catalog

    template = next(iter(catalog.installed().templates.values()))
    config = Config.of(template.name, {})
    now = record(config=config, template_digest=template.digest)
    with Database.open(url) as database:
        database.set_best(now)
        assert not database.set_best(record(outcome="predicted", created=LATER))
        assert database.bests() == [now]


def test_summary_counts_rows(database: Database, record: Make) -> None:
    database.add(record())
    database.set_best(record())
    found = database.summary()
    assert [found[name] for name in ("trial", "best", "run", "dispatch", "pack")] == [1, 1, 0, 0, 0]
    assert found["schema"] == 3
    assert found["writable"] is True


@pytest.mark.parametrize(
    "name",
    [
        "b2s3x5h8/2d64x32f-float16-unaligned",
        "b2s300h8/2d64cw127cap30",
        "b2s300h8d64fw1x2-float8_e4m3fn",
    ],
)
@pytest.mark.sqlite
def test_a_problem_is_stored_with_all_its_fields(
    database: Database, url: str, record: Make, name: str
) -> None:
    database.add(record(name))
    connection = raw(url)
    connection.row_factory = sqlite3.Row
    row = connection.execute("SELECT * FROM trial").fetchone()
    connection.close()
    problem = Problem.parse(name)
    assert {name: row[name] for name in problem.to_dict()} == problem.to_dict()
    assert row["problem"] == problem.name
