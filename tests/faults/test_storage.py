"""Disks that are full, caches that are read-only, databases that are damaged, newer or shared."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import EFFORT, PROBLEM, TEMPLATES, Tune, catalog

from autoflash import device, errors, settings
from autoflash.cli import main
from autoflash.database import Database
from autoflash.record import Record
from autoflash.tuning.ledger import Ledger
from autoflash.tuning.lock import device_lock
from autoflash.tuning.process import environment
from autoflash.tuning.progress import Event, TuneResult
from autoflash.tuning.tuner import tune

CPU = device.for_arch("cpu")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path}/tuning.db") as opened:
        yield opened


def run(database: Database, trials: int, **options) -> TuneResult:
    options = {"effort": EFFORT, "catalog": catalog(), "max_trials": trials} | options
    (result,) = tune([PROBLEM], CPU, database=database, **options)
    return result


def full(database: Database, *, pages: int) -> None:
    """Let the file have so many pages: SQLite then says that the disk is full."""
    with database._store.opened.engine.connect() as opened:
        opened.exec_driver_sql(f"PRAGMA max_page_count={pages}")


# A full disk ------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while_loses_nothing(tuned: Tune, database: Database) -> None:
    tuned({}, max_trials=1)
    before = database.trials()
    messages: list[str] = []

    def on_event(event: Event) -> None:
        messages.append(event.message)
        if event.kind == "start":
            full(database, pages=1)
        elif event.kind == "finalist":
            full(database, pages=100_000)

    (result,) = tuned({}, on_event=on_event)
    assert any("records wait to be stored" in each and "full" in each for each in messages)
    after = database.trials()
    assert after[: len(before)] == before
    assert len({record.config for record in after}) == len(after) == result.trials > 40
    assert result.status == "improved"
    assert database.bests() == [result.best]
    assert database.runs()[-1]["status"] == "done"


def test_what_a_full_disk_keeps_from_the_database_is_in_a_file(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(database, 1)
    (stored,) = database.trials()
    full(database, pages=1)
    kept: list[Record] = []
    ledger = Ledger(database)
    # A row as long as its reason does not fit into what is free of the last page.
    for number in range(30):
        kept.append(_longer(stored, number))
        ledger.trial(kept[-1], None)
    with pytest.raises(errors.DatabaseError, match=r"autoflash db load --trials (\S+)") as raised:
        ledger.close()
    found = str(raised.value).split("--trials ")[1].split("`")[0]
    in_database = len(database.trials())
    full(database, pages=100_000)
    assert database.load(found, trials=True) == 1 + 30 - in_database
    assert {r.reason for r in database.trials()} == {"", *(record.reason for record in kept)}


def _longer(record: Record, number: int) -> Record:
    return dataclasses.replace(record, reason=f"{number}" + "x" * 2000)


def test_a_disk_that_is_full_throughout_ends_with_an_error_that_says_where_the_trials_are(
    tuned: Tune, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def on_event(event: Event) -> None:
        if event.kind == "start":
            full(database, pages=1)

    with pytest.raises(errors.DatabaseError, match=r"not be stored: .*full.*trials\.jsonl"):
        tuned({}, on_event=on_event)
    (file,) = tmp_path.glob("autoflash-unsaved-*/trials.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["outcome"] for line in lines} == {"ok"}
    assert len(lines) + len(database.trials()) == 44


# A cache that cannot be written -----------------------------------------------------------------


def test_a_read_only_cache_still_tunes(cache_dir: Path) -> None:
    cache_dir.write_text("a file where the directory would be")
    with Database.open("sqlite://") as memory, pytest.warns(RuntimeWarning, match="cannot write"):
        result = run(memory, 1)
    assert (result.status, result.trials) == ("unimproved", 1)


# Several tuners ---------------------------------------------------------------------------------


def test_two_runs_do_not_share_a_device(cache_dir: Path) -> None:
    with device_lock(CPU, None, cache_dir):
        with (
            pytest.raises(errors.CacheError, match=rf"{os.getpid()}.*waited 0 s"),
            device_lock(CPU, None, cache_dir, wait_s=0.1),
        ):
            pass
        with device_lock(CPU, "1", cache_dir, wait_s=0.1):
            assert len(list((cache_dir / "locks").glob("*.pid"))) == 2
    with device_lock(CPU, None, cache_dir, wait_s=0.1):
        pass
    assert not list((cache_dir / "locks").glob("*.pid"))


TUNER = """
import dataclasses, sys
from pathlib import Path
from autoflash import device
from autoflash.codegen.catalog import Catalog
from autoflash.database import Database
from autoflash.errors import CacheError
from autoflash.problem import Problem
from autoflash.tuning import lock
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.tuner import tune

url, templates, problem, seed = sys.argv[1:]
effort = dataclasses.replace(EFFORTS["quick"], seconds=None, timing_ms=5.0, finals_ms=5.0)
try:
    with Database.open(url) as database:
        (result,) = tune(
            [Problem.parse(problem)], device.for_arch("cpu"), database=database, effort=effort,
            catalog=Catalog.load(Path(templates)), max_trials=3, seed=int(seed),
        )
    print("trials", result.trials)
except CacheError as error:
    print("refused", error)
"""


def tuner(url: str, cache: Path, problem: str, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TUNER, url, str(TEMPLATES), problem, str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(cache_dir=cache, visible=None) | {"AUTOFLASH_JOBS": "1"},
    )


def test_two_tuners_on_one_database_store_all_trials_of_both(
    tmp_path: Path, database: Database
) -> None:
    # With caches of their own they do not see each other's lock.
    problems = [PROBLEM.name, "b1s40h2/2d16c-float32"]
    url = f"sqlite:///{tmp_path}/tuning.db"
    both = [tuner(url, tmp_path / name, name, 1) for name in problems]
    said = [each.communicate(timeout=300)[0] for each in both]
    assert said == ["trials 3\n", "trials 3\n"]
    # What crashed and was tried again is there twice.
    tried = {(record.problem.name, record.config) for record in database.trials()}
    assert sorted(name for name, _ in tried) == sorted(3 * problems)
    assert {record.problem.name for record in database.bests()} == set(problems)
    assert [noted["status"] for noted in database.runs()] == ["done", "done"]


def test_a_second_tuner_on_one_device_waits_and_then_says_who_has_it(
    tmp_path: Path, database: Database
) -> None:
    with device_lock(CPU, None, settings.get().cache_dir):
        second = tuner(f"sqlite:///{tmp_path}/tuning.db", settings.get().cache_dir,
                       PROBLEM.name, 0)  # fmt: skip
        said, _ = second.communicate(timeout=120)
    assert said.startswith("refused")
    assert f"pid {os.getpid()}" in said
    assert database.trials() == []


# Databases that are not as they should be -------------------------------------------------------


def test_a_trial_whose_row_is_damaged_is_made_again(tmp_path: Path, database: Database) -> None:
    run(database, 2)
    # The faster one, for the other may drop out of the race when it is tried again.
    (first, second) = sorted(database.trials(), key=lambda record: record.latency_us or math.inf)
    raw = sqlite3.connect(tmp_path / "tuning.db")
    raw.execute("UPDATE trial SET record = substr(record, 1, 100) WHERE config = ?",
                [first.config.key])  # fmt: skip
    raw.execute("UPDATE best SET record = 'no JSON'")
    raw.commit()
    raw.close()
    with pytest.warns(RuntimeWarning, match="does not parse"):
        result = run(database, 2)
    assert result.status in ("improved", "unimproved")
    assert database.bests() == [result.best]
    found = database.trials()
    assert second in found
    (again,) = (record for record in found if record.config == first.config)
    assert again.outcome == "ok"


def test_a_database_of_a_newer_version_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "newer.db"
    Database.open(str(path)).close()
    raw = sqlite3.connect(path)
    raw.execute("INSERT INTO autoflash_schema VALUES (99, '77.7', '2030')")
    raw.commit()
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.close()
    before = path.read_bytes()
    # What `main` writes, monkeypatch takes back.
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
    monkeypatch.setenv("AUTOFLASH_DATABASE", "")
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--shape", PROBLEM.name, "--database", str(path)])
    said = capsys.readouterr().err
    assert "version 99" in said
    assert "Traceback" not in said
    assert path.read_bytes() == before
