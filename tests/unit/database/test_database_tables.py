"""Dispatch tables in the database: which stays, dumps, packs, merging, pruning."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from support.dispatch_tables import table

from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.dispatch_table import DispatchTable, Family
from autoflash.problem import Problem
from autoflash.record import Record

Make = Callable[..., Record]
CURRENT = {"triton/fwd": "d1", "cpp/fwd": "c1"}
LATER = "2026-11-22T10:00:00+00:00"
FULL = table(family=Family.of(Problem.parse("b1s1h1d64f")))


def test_a_table_comes_back_equal(database: Database, url: str) -> None:
    assert database.set_table(table())
    with Database.open(url, digests=CURRENT) as again:
        assert again.tables() == [table()]
        assert again.tables(KNOWN_GPUS["sm90"].key) == [table()]
        assert again.tables("another") == []
    assert database.summary()["dispatch"] == 1


def test_a_table_without_a_moment_gets_one(database: Database) -> None:
    database.set_table(table(created=""))
    assert database.tables()[0].created


@pytest.mark.parametrize(
    ("held", "new", "stored"),
    [
        ({}, {"created": LATER}, True),
        ({"created": LATER}, {}, False),
        ({}, {"digests": {"triton/fwd": "former"}, "created": LATER}, False),
        ({"digests": {"triton/fwd": "former"}, "created": LATER}, {}, True),
    ],
)
def test_which_of_two_tables_stays(
    database: Database, held: dict[str, object], new: dict[str, object], stored: bool
) -> None:
    database.set_table(table(**held))
    assert database.set_table(table(**new)) is stored
    assert database.tables() == [table(**(new if stored else held))]


def test_tables_are_kept_per_family_and_device(database: Database) -> None:
    sibling = dataclasses.replace(KNOWN_GPUS["sm90"], name="NVIDIA H20", num_sms=78)
    every = [table(), FULL, table(device=sibling)]
    for each in every:
        database.set_table(each)
    assert len(database.tables()) == 3
    assert database.tables(sibling.key) == [every[2]]


def test_a_dump_holds_tables_behind_the_records(
    database: Database, tmp_path: Path, record: Make
) -> None:
    for each in (FULL, table()):
        database.set_table(each)
    database.set_best(record())
    path = tmp_path / "dump.jsonl"
    assert database.dump(path) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(line) == ["table"] for line in lines] == [False, True, True]
    assert [line["table"]["family"]["causal"] for line in lines[1:]] == [True, False]
    with Database.open("sqlite://", digests=CURRENT) as other:
        assert other.load(path) == 3
        assert other.tables() == database.tables()
        assert other.load(path) == 0
        again = tmp_path / "again.jsonl"
        other.dump(again)
    assert again.read_bytes() == path.read_bytes()
    assert database.dump(path, trials=True) == 0


def test_a_damaged_line_of_a_table_is_named_and_the_others_count(
    database: Database, tmp_path: Path
) -> None:
    database.set_table(table())
    path = tmp_path / "dump.jsonl"
    database.dump(path)
    data = json.loads(path.read_text())
    data["table"]["tuned"] = [["b1s512h8d64c", 7]]
    path.write_text(path.read_text() + json.dumps(data, separators=(",", ":")) + "\n")
    with Database.open("sqlite://", digests=CURRENT) as other:
        with pytest.warns(RuntimeWarning, match=r"dump.jsonl:2: config 7 of a table that has 2"):
            assert other.load(path) == 1
        assert other.tables() == [table()]


def test_a_pack_brings_tables_and_takes_them_away(
    packs: Path, url: str, database: Database
) -> None:
    database.set_table(table())
    database.dump(packs / "h200.jsonl")
    database.close()
    with Database.open("sqlite://", digests=CURRENT) as shipped:
        assert shipped.tables() == [table()]
        assert shipped.prune({"triton/fwd": "next"}) == 0  # it would come back
        mine = table(created="2026-11-01T10:00:00+00:00")
        assert shipped.set_table(mine)  # what was made here stands above packs
        assert shipped.tables() == [mine]
    (packs / "h200.jsonl").unlink()
    (packs / "full.jsonl").write_text("")
    with Database.open("sqlite://", digests=CURRENT) as without:
        assert without.tables() == []


def test_merging_takes_over_what_was_made_there(
    database: Database, packs: Path, tmp_path: Path
) -> None:
    other_url = f"sqlite:///{tmp_path}/other.db"
    with Database.open(other_url, digests=CURRENT) as other:
        other.set_table(table())
    assert database.merge(other_url) == 1
    assert database.tables() == [table()]
    assert database.merge(other_url) == 0


def test_prune_takes_away_tables_of_former_templates(database: Database) -> None:
    database.set_table(table())
    database.set_table(dataclasses.replace(FULL, digests={"triton/fwd": "former"}))
    assert database.prune(CURRENT) == 1
    assert database.tables() == [table()]


@pytest.mark.sqlite
def test_a_row_that_does_not_parse_is_a_miss(database: Database, tmp_path: Path) -> None:
    for each in (FULL, table()):
        database.set_table(each)
    with sqlite3.connect(tmp_path / "autoflash.db") as connection:
        connection.execute("UPDATE dispatch SET content = '{}' WHERE family LIKE '%64f%'")
    with pytest.warns(RuntimeWarning, match="table dispatch does not parse"):
        assert database.tables() == [table()]
    assert database.skipped["dispatch"] == 1
    new: DispatchTable = FULL
    assert database.set_table(new)
    assert new in database.tables()
