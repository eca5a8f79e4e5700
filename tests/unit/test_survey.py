"""A survey runs every config once, whatever becomes of it, and goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.workers import FakeWorkers

from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.device import KNOWN_GPUS
from autoflash.errors import InvalidInput, WorkerError
from autoflash.problem import Problem
from autoflash.tuning import survey as surveys
from autoflash.tuning.survey import CHECKED, survey
from autoflash.tuning.table import Table

CATALOG = Catalog.load(Path(__file__).parents[1] / "data" / "plane")
GPU = KNOWN_GPUS["sm90"]
PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")
OTHER = Problem.parse("b2s2048h8d64c-bfloat16")
SOURCES, TWINS = 39, 5  # x = 0 renders alike for both values of `same`


class Workers(FakeWorkers):
    """Workers that answer at once, by the numbers in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[tuple[int, int], Mapping[str, Any]] = {}
        self.hello: Mapping[str, Any] = {"outcome": "ok", "environment": {"torch": "pretended"}}
        self.requests: list[Mapping[str, Any]] = []

    def answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if request["kind"] == "hello":
            return self.hello
        words = request["source"]["text"].split()
        x, y = (int(word.partition("=")[2]) for word in words[1:3])
        if request["kind"] == "compile":
            return {"outcome": "ok", "resources": {"compile_s": 0.5, "registers": 40}}
        self.requests.append(request)
        if (x, y) in self.faults:
            return self.faults[x, y]
        us = 100.0 + 10 * (x - 2) ** 2 + y
        reply = {"outcome": "ok", "load_s": 0.1, "rungs": [[us, us, us, 3, 0.01]] * 3}
        if request["check"]:
            reply["check_s"] = 0.2
        if request["do_bench"]:
            reply["do_bench"] = [us, 0.13]
        return reply


def run(folder: Path, workers: Workers, *problems: Problem, **options: Any) -> list[Table]:
    return survey(problems or (PROBLEM,), GPU, folder, catalog=CATALOG, workers=workers, **options)


def config(x: int, y: int, same: str = "a") -> Config:
    return Config.of("triton/plane", {"x": x, "y": y, "same": same})


def test_every_config_is_run_once_and_the_default_first(tmp_path: Path) -> None:
    workers = Workers()
    (table,) = run(tmp_path, workers)
    assert len(table.rows) == table.feasible == SOURCES + TWINS
    assert list(table.rows)[:2] == [config(6, 3), config(5, 3)]
    assert workers.seen == {"hello": 1, "compile": SOURCES, "survey": SOURCES}
    assert table.best.config == config(2, 0)
    assert table.rows[config(0, 1, "a")].rungs == table.rows[config(0, 1, "b")].rungs
    assert table.header.environment == {"torch": "pretended"}
    assert table.rows[config(2, 0)].compile_s == 0.5


def test_sources_are_compiled_and_checked_once_for_all_problems(tmp_path: Path) -> None:
    workers = Workers()
    first, second = run(tmp_path, workers, PROBLEM, OTHER)
    assert workers.seen == {"hello": 1, "compile": SOURCES, "survey": 2 * SOURCES}
    assert len(second.rows) == len(first.rows)
    problems = [request["problem"]["seqlen_q"] for request in workers.requests]
    assert problems == sorted(problems)  # one after the other: inputs are made anew for each
    checked = [r for r in workers.requests if r["check"] and r["problem"]["seqlen_q"] == 2048]
    assert len(checked) == CHECKED
    assert second.median("check_s") == 0.2


def test_failures_are_rows(tmp_path: Path) -> None:
    workers = Workers()
    workers.faults[2, 0] = {"outcome": "wrong_result", "reason": "off", "check_s": 0.4}
    workers.faults[3, 0] = {"outcome": "crash", "reason": "died"}
    first, second = run(tmp_path, workers, PROBLEM, OTHER)
    assert first.rows[config(2, 0)].outcome == "wrong_result"
    assert first.rows[config(3, 0)].outcome == "crash"
    assert workers.seen["hello"] == 2  # the device is seen to work again after the crash
    # What was found wrong once is not run on other lengths.
    assert second.rows[config(2, 0)].outcome == "wrong_result"
    assert first.best.config not in (config(2, 0), config(3, 0))


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (whole,) = run(tmp_path / "whole", Workers())
    (path,) = (tmp_path / "whole").glob("*.jsonl")
    lines = path.read_text().splitlines()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / path.name).write_text("\n".join([*lines[:11], lines[11][:20]]))
    workers = Workers()
    (table,) = run(tmp_path / "part", workers)
    assert table.rows.keys() == whole.rows.keys()
    assert list(table.rows.values())[:10] == list(whole.rows.values())[:10]
    assert 0 < workers.seen["survey"] <= SOURCES + TWINS - 10


def test_a_sample_has_the_seeds_and_says_so(tmp_path: Path) -> None:
    (table,) = run(tmp_path, Workers(), sample=7)
    assert len(table.rows) == 2 + 7
    assert {config(6, 3), config(5, 3)} <= table.rows.keys()
    assert table.feasible == SOURCES + TWINS
    assert "7 random configs" in table.header.sample
    with pytest.raises(InvalidInput, match="sample"):
        run(tmp_path, Workers())


def test_do_bench_is_asked_for_at_times(tmp_path: Path) -> None:
    (table,) = run(tmp_path, Workers(), do_bench_every=10)
    assert sum(row.do_bench is not None for row in set_of(table)) == 4


def set_of(table: Table) -> list[Any]:
    """One row of each source."""
    return list({row.source: row for row in table.rows.values()}.values())


def test_no_time_is_no_rows(tmp_path: Path) -> None:
    workers = Workers()
    tables = run(tmp_path, workers, seconds=0.0)
    assert sum(len(table.rows) for table in tables) == 0
    assert workers.seen["survey"] == 0


def test_a_device_that_does_not_work_ends_it(tmp_path: Path) -> None:
    workers = Workers()
    workers.hello = {"outcome": "runtime_error", "reason": "no kernel runs"}
    with pytest.raises(WorkerError, match="no kernel runs"):
        run(tmp_path, workers)


def test_an_absent_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not here"):
        surveys.survey([PROBLEM], GPU, tmp_path, catalog=CATALOG)
