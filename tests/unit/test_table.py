"""Tables come back as they were written, go on where they were left, and refuse what is damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.tables import PROBLEM, header, point, row, table

from autoflash.errors import InvalidInput
from autoflash.tuning.table import Row, Table, Writer, read, read_all

FULL = dataclasses.replace(
    row(point(1, 2), 123.4, source="abc"),
    do_bench=(120.5, 0.131),
    resources={"registers": 168, "smem_bytes": 4096},
)


def write(path: Path, *rows: Row) -> Writer:
    writer = Writer(path, header(seeds=[point(1, 2)]))
    for each in rows:
        writer.add(each)
    return writer


def test_what_was_written_is_read(tmp_path: Path) -> None:
    rows = [FULL, row(point(3, 4, True), None, "compile_error"), Row(
        config=point(0, 1), outcome="wrong_result", check_s=0.3)]  # fmt: skip
    write(tmp_path / "a.jsonl", *rows)
    found = read(tmp_path / "a.jsonl")
    assert list(found.rows.values()) == rows
    assert found.header == header(seeds=[point(1, 2)])
    assert found.best == FULL
    assert found.median("check_s") == 0.2
    assert found.feasible == 80


def test_a_recording_that_was_killed_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, FULL)
    with path.open("a") as file:
        file.write('{"template":"made/up","val')
    writer = Writer(path, header())
    assert set(writer.done) == {FULL.config}
    writer.add(row(point(3, 4)))
    assert set(read(path).rows) == {FULL.config, point(3, 4)}


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"timing_ms": 30.0}, "timing_ms=50.0, not 30.0"), ({"policy": "other"}, "policy=made-up")],
)
def test_a_recording_goes_on_only_under_the_same_conditions(
    tmp_path: Path, changed: dict, named: str
) -> None:
    write(tmp_path / "a.jsonl", FULL)
    with pytest.raises(InvalidInput, match=named):
        Writer(tmp_path / "a.jsonl", dataclasses.replace(header(), **changed))


def test_a_recording_does_not_go_on_with_another_template(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", FULL)
    space = dataclasses.replace(header().spaces["made/up"], digest="4567")
    with pytest.raises(InvalidInput, match=r"other templates: .*0123.*4567"):
        Writer(tmp_path / "a.jsonl", dataclasses.replace(header(), spaces={"made/up": space}))


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"template":"made/up","values":[1],"outcome":"ok"}',
     '{"template":"made/up","values":[1,2,false],"outcome":"great"}',
     '{"template":"other","values":[1,2,false],"outcome":"ok"}'],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    write(path, FULL)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InvalidInput, match=r"a\.jsonl:3 is no line of a table"):
        read(path)


def test_another_version_and_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    first = json.loads(path.read_text())
    path.write_text(json.dumps({**first, "table": 2}) + "\n")
    with pytest.raises(InvalidInput, match=r"a\.jsonl:1 .*version 2"):
        read_all([path])
    with pytest.raises(InvalidInput, match="holds no table"):
        read_all([tmp_path / "nowhere", tmp_path / "nothing"][:0])
    with pytest.raises(InvalidInput, match="cannot be read"):
        read(tmp_path / "nowhere.jsonl")


def test_a_table_in_which_nothing_worked_has_no_best() -> None:
    with pytest.raises(InvalidInput, match="no config that worked"):
        _ = table(lambda config: None).best


def test_slow_rows_have_a_time_and_failed_ones_none() -> None:
    assert row(point(1, 1), 9.0, "slow").latency_us == 9.0
    assert row(point(1, 1), 9.0, "wrong_result").latency_us is None
    assert Table(header(), [row(point(1, 1), 9.0, "slow")]).best.latency_us == 9.0
    assert PROBLEM.name == table().name
