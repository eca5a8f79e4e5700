"""A stored winner loses its title to nobody untried, and a default is heard before it is given up.

Also: what ends a search, and what is then said of it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.plane import (
    CATALOG,
    FEASIBLE,
    GPU,
    OTHER,
    PROBLEM,
    Workers,
    at,
    bowl,
    config,
    measurement,
    opened,
    run,
)

from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import for_arch
from autoflash.errors import CacheError
from autoflash.tuning import finals, tuner
from autoflash.tuning.boards import Board
from autoflash.tuning.effort import EFFORTS, Effort
from autoflash.tuning.lock import device_lock
from autoflash.tuning.run import Run
from autoflash.tuning.tuner import tune

Reply = Mapping[str, Any]


@pytest.fixture
def database() -> Iterator[Database]:
    with opened() as found:
        yield found


@pytest.fixture
def two(tmp_path: Path) -> Catalog:
    """triton/plane, and triton/other of the same text but for its mark."""
    folder = tmp_path / "two"
    shutil.copytree(Path(__file__).parents[1] / "data" / "plane", folder)
    (plane,) = folder.rglob("plane.py.jinja")
    plane.with_name("other.py.jinja").write_text(plane.read_text().replace("# x=", "# other x="))
    return Catalog.load(folder)


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass."""
    real, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def wait(seconds: float) -> None:
        ahead[0] += seconds

    return wait


class Ranked(Workers):
    """Kernels of triton/other take a third of the time."""

    def evaluate(self, request: Reply) -> Reply:
        return {**super().evaluate(request), "outcome": "ok", **self._timed(request["source"])}

    def finals(self, request: Reply) -> Reply:
        found = dict(super().finals(request))
        times = {name: self._timed(source) for name, source in request["sources"].items()}
        found["measurements"] |= {name: time["measurement"] for name, time in times.items()}
        rounds = {name: [time["latency_us"]] * request["rounds"]
                  for name, time in found["measurements"].items()}  # fmt: skip
        return {**found, "rounds": rounds}

    def _timed(self, source: Reply) -> dict[str, Any]:
        slower = 1.0 if "other" in source["text"] else 3.0
        return {"measurement": measurement(slower * bowl(*at(source)))}


# Who holds a title ------------------------------------------------------------------------------


def test_trials_newer_than_the_winner_get_their_finals(database: Database) -> None:
    (first,) = run(database, Workers(), max_trials=3)
    assert first.best.config != config(2, 1)
    time.sleep(1.1)  # records are dated to the second

    class Killed(Workers):
        def finals(self, request: Reply) -> Reply:
            raise KeyboardInterrupt

    (second,) = run(database, Killed())
    assert (second.status, second.trials) == ("partial", FEASIBLE)
    workers = Workers()
    (third,) = run(database, workers)
    assert (third.status, third.best.config) == ("improved", config(2, 1))
    assert workers.seen == {"hello": 1, "finals": 1}
    (fourth,) = run(database, workers)
    assert fourth.reason == "nothing left to try; stored earlier"


@pytest.mark.parametrize("limits", [{"max_trials": 1}, {"max_seconds": 20.0}])
def test_a_winner_from_elsewhere_is_tried_before_it_is_replaced(
    database: Database, passing: Callable[[float], None], limits: dict[str, Any]
) -> None:
    with opened() as source:
        (found,) = run(source, Workers())
    database.set_best(found.best)
    workers = Workers()
    workers.on_evaluate = lambda: passing(30.0)
    (result,) = run(database, workers, **limits)
    assert workers.evaluated == [(6, 3), (2, 1)]
    assert result.best.config == database.bests()[0].config == config(2, 1)


def test_a_winner_from_elsewhere_that_fails_here_is_replaced(database: Database) -> None:
    with opened() as source:
        (found,) = run(source, Workers())
    database.set_best(found.best)
    workers = Workers()
    workers.faults[2, 1] = {"outcome": "wrong_result", "reason": "nan"}
    run(database, workers, max_trials=1)
    assert database.bests()[0].config == config(6, 3)


def test_a_search_of_some_templates_races_the_winner_of_another(two: Catalog) -> None:
    with opened(two) as database:
        (other,) = run(database, Ranked(), catalog=two, templates=["triton/other"])
        workers = Ranked()
        (plane,) = run(database, workers, catalog=two, templates=["triton/plane"])
        assert (plane.trials, workers.seen["finals"]) == (FEASIBLE, 1)
        assert (
            plane.best.config == other.best.config == Config.of("triton/other", dict(config(2, 1)))
        )
        assert database.bests() == [plane.best]


def test_the_winner_of_another_template_loses_to_what_is_faster(two: Catalog) -> None:
    with opened(two) as database:
        (before,) = run(database, Ranked(), catalog=two, templates=["triton/other"])
        faster = Workers(lambda x, y: bowl(x, y) if (x, y) != (2, 1) else 50.0)
        (after,) = run(database, faster, catalog=two, templates=["triton/plane"])
        assert before.best.config.template == "triton/other"
        assert after.status == "improved"
        assert after.best.measurement.latency_us == 50.0
        assert database.bests() == [after.best]


@pytest.mark.parametrize("outcome", ["crash", "timeout"])
def test_a_default_is_compiled_twice_before_it_is_given_up(
    database: Database, outcome: str
) -> None:
    class Once(Workers):
        def compile(self, request: Reply) -> Reply:
            reply = super().compile(request)
            first = self.compiled.count((6, 3)) == 1 and at(request["source"]) == (6, 3)
            return {"outcome": outcome, "reason": "killed by SIGKILL"} if first else reply

    workers = Once(lambda x, y: 100.0 + abs(x - 6) + abs(y - 3))
    results = run(database, workers, PROBLEM, OTHER)
    assert workers.compiled.count((6, 3)) == 2
    assert [(r.status, r.best.config) for r in results] == [("unimproved", config(6, 3))] * 2


def test_a_default_that_never_compiles_is_given_up(database: Database) -> None:
    workers = Workers()
    workers.compile_faults[6, 3] = {"outcome": "crash", "reason": "killed by SIGKILL"}
    (result,) = run(database, workers)
    assert workers.compiled.count((6, 3)) == 2
    assert (result.status, result.best.config) == ("improved", config(2, 1))


# What ends a search -----------------------------------------------------------------------------


def test_too_little_time_is_not_called_nothing_left(database: Database) -> None:
    run(database, Workers(), max_trials=3)
    (result,) = run(database, Workers(), max_seconds=0.01)
    assert (result.status, result.trials) == ("partial", 3)
    assert result.reason == "no time for another trial; stored earlier"
    assert result.best is not None


def test_what_keeps_a_template_from_being_built_is_said(database: Database) -> None:
    run(database, Workers(), max_trials=3)
    workers = Workers()
    full = {"outcome": "compile_error", "raise": "CacheError", "reason": "no space left below /c"}
    workers.compile_faults = {(x, y): full for x in range(8) for y in range(5)}
    (result,) = run(database, workers)
    assert result.status == "partial"
    assert result.reason.startswith("triton/plane cannot be built: no space left below /c")


def test_a_template_that_cannot_be_built_takes_no_time_from_the_others(
    two: Catalog, passing: Callable[[float], None]
) -> None:
    class Blocked(Workers):
        def compile(self, request: Reply) -> Reply:
            if "other" in request["source"]["text"]:
                return {"outcome": "compile_error", "raise": "CacheError", "reason": "no space"}
            return super().compile(request)

    workers = Blocked()
    workers.on_evaluate = lambda: passing(20.0)
    with opened(two) as database:
        (result,) = run(database, workers, catalog=two, max_seconds=20.0)
    assert result.trials <= 2


def test_a_default_that_is_wrong_does_not_end_a_short_search(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner.build, "jobs_within_memory", lambda *options: 1)
    workers = Workers()
    workers.faults[6, 3] = {"outcome": "wrong_result", "reason": "nan"}
    (result,) = run(database, workers, max_seconds=2.0)
    assert result.best is not None


def test_a_device_that_is_absent_and_compiles_nothing_ends_in_time(
    database: Database, monkeypatch: pytest.MonkeyPatch, passing: Callable[[float], None]
) -> None:
    class Broken(Workers):
        def compile(self, request: Reply) -> Reply:
            passing(5.0)
            return {"outcome": "compile_error", "reason": "nvcc fatal"}

    monkeypatch.setattr(tuner, "Pool", lambda **options: Broken())
    (result,) = tune(
        [PROBLEM], GPU, database=database, effort="normal", catalog=CATALOG, max_seconds=20.0
    )
    assert result.status == "invalid"
    assert result.trials < 20


@pytest.mark.parametrize("name", ["normal", "full"])
@pytest.mark.parametrize("seconds", [20.0, 60.0])
def test_finals_of_long_calls_leave_the_search_half_of_the_time(name: str, seconds: float) -> None:
    effort, cpu, us = EFFORTS[name].within(seconds), for_arch("cpu"), 160_000.0
    with opened() as database:
        asked = Run(
            device=cpu, templates=CATALOG.templates, database=database, effort=effort,
            policy="p", workers=Workers(), seed=0, jobs=1,
        )  # fmt: skip
        assert finals.estimate_s(asked, us) <= seconds / 2
        assert finals.rounds_within(asked, us) >= finals.FEWEST_ROUNDS
        assert finals.rounds_within(asked, 100.0) == effort.rounds


def test_devices_without_a_problem_lengthen_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(effort: Effort, seconds: float) -> None:
        raise RuntimeError(seconds)

    monkeypatch.setattr(Effort, "within", stop)
    boards = [Board(index=i, device=GPU, visible=str(i)) for i in range(8)]
    for problems in ((PROBLEM,), (PROBLEM, OTHER)):
        with pytest.raises(RuntimeError) as asked:
            run(database, Workers(), *problems, max_seconds=10.0, boards=boards)
        assert asked.value.args == (10.0,)


def test_a_lock_of_another_user_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("no directory")
    with (
        pytest.raises(CacheError, match=r"cannot be locked .* set AUTOFLASH_CACHE_DIR"),
        device_lock(GPU, None, tmp_path),
    ):
        pass
