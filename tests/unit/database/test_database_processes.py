"""Whether processes can share a database, and be killed, without losing what was stored."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoflash.database import Database, rows
from autoflash.record import Record

Make = Callable[..., Record]

ADD = """
import dataclasses, sys
from autoflash.database import Database, rows
url, line, name, count = sys.argv[1:]
record = rows.parse(line)
database = Database.open(url)
for number in range(int(count)):
    database.add(dataclasses.replace(record, reason=f"{name} {number}"))
    database.set_best(record)
    print(number, flush=True)
"""


def start(url: str, record: Record, name: str, count: int) -> subprocess.Popen[str]:
    line = rows.canonical(record.to_dict())
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", ADD, url, line, name, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_writers_that_start_at_once_all_succeed(
    packs: Path, url: str, tmp_path: Path, record: Make
) -> None:
    (packs / "one.jsonl").write_text(rows.canonical(record("b1s1h1d64f").to_dict()))
    # The database does not exist: each finds that out, and one makes it.
    writers = [start(url, record(), str(each), 60) for each in range(3)]
    for writer in writers:
        _, said = writer.communicate(timeout=60)
        assert writer.returncode == 0, said
    with Database.open(url) as database:
        stored = {trial.reason for trial in database.trials()}
        assert stored == {f"{each} {number}" for each in range(3) for number in range(60)}
        assert database.bests() == [record("b1s1h1d64f"), record()]
        assert database.summary()["pack"] == 1


@pytest.mark.sqlite
def test_a_killed_writer_loses_nothing_that_was_stored(packs: Path, url: str, record: Make) -> None:
    writer = start(url, record(), "killed", 100_000)
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(50)]
    writer.send_signal(signal.SIGKILL)
    rest, _ = writer.communicate(timeout=60)
    assert writer.returncode == -signal.SIGKILL
    told += [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    with Database.open(url) as database:
        assert database.writable
        stored = {trial.reason for trial in database.trials()}
        assert stored >= {f"killed {number}" for number in told}
        assert len(stored) <= len(told) + 1  # it may have died between storing and telling
        database.add(record(reason="after"))
        connection = sqlite3.connect(database.place)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()


@pytest.mark.sqlite
def test_a_reader_is_not_held_up_by_a_writer_nor_reads_half(
    database: Database, url: str, record: Make
) -> None:
    database.add(record())
    writer = sqlite3.connect(database.place, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM trial")
    with Database.open(url) as reader:
        assert reader.trials() == [record()]
    writer.execute("ROLLBACK")
    writer.close()


@pytest.mark.sqlite
def test_a_writer_that_waits_in_vain_says_so(
    packs: Path, url: str, record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoflash.database import connection
    from autoflash.errors import DatabaseError

    monkeypatch.setattr(connection, "BUSY_TIMEOUT_S", 0.05)
    with Database.open(url) as database:
        other = sqlite3.connect(database.place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="Another process has been writing"):
            database.add(record())
        other.execute("ROLLBACK")
        other.close()
        database.add(record())
        assert database.trials() == [record()]
