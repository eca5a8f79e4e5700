"""Several devices on one list of problems, with pretended workers: the same records, no less."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.workers import FakeWorkers

from autoflash import errors
from autoflash.codegen.catalog import Catalog
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.tuning import boards, tuner
from autoflash.tuning.boards import Board
from autoflash.tuning.effort import Effort
from autoflash.tuning.tuner import Event, TuneResult, tune

CATALOG = Catalog.load(Path(__file__).parents[1] / "data" / "plane")
GPU = KNOWN_GPUS["sm90"]
PROBLEMS = [Problem.parse(f"b2s{1024 * n}h8d64c-bfloat16") for n in range(1, 6)]
EFFORT = Effort(
    name="test", trials=100, seconds=None, timing_ms=1.0, finalists=2, rounds=9, finals_ms=1.0,
    compiles=10, compile_seconds=None,
)  # fmt: skip
SOURCES, CONFIGS = 39, 44  # of the catalog: some configs render the same

Reply = Mapping[str, Any]


class Host:
    """Devices that answer at once, by the numbers in the source."""

    def __init__(self, devices: int) -> None:
        self.boards = [Board(index=i, device=GPU, visible=str(i)) for i in range(devices)]
        self.compiled: list[tuple[int, int]] = []
        self.evaluated: dict[str, list[tuple[str, tuple[int, int]]]] = {}
        self.pools: list[Workers] = []
        self.on_evaluate: Callable[[str], Reply | None] = lambda board: None
        self.on_finals: Callable[[str], Reply | None] = lambda board: None
        self.dead: set[str] = set()
        self.compile_fault: Reply | None = None
        # Nobody goes on before each has a problem, or one thread could do it all.
        self._all_there = threading.Barrier(devices)

    def pool(self, *, jobs: int, cache_dir: Path, visible: str | None) -> Workers:
        self.pools.append(Workers(self, visible or ""))
        return self.pools[-1]

    def compile(self, request: Reply, board: str) -> Reply:
        assert board == "" or len(self.boards) == 1
        self.compiled.append(at(request))
        return self.compile_fault or {"outcome": "ok", "resources": {}}

    def hello(self, request: Reply, board: str) -> Reply:
        if board not in self.evaluated:
            self.evaluated[board] = []
            self._all_there.wait(120)
        if board in self.dead:
            return {"outcome": "crash", "reason": "killed by SIGSEGV"}
        return {"outcome": "ok", "environment": {"torch": "pretended", "board": board}}

    def evaluate(self, request: Reply, board: str) -> Reply:
        self.evaluated[board].append((request["problem"]["seqlen_q"], at(request)))
        if fault := self.on_evaluate(board):
            return fault
        return {"outcome": "ok", "measurement": measured(at(request)), "error_ratio": 0.5}

    def finals(self, request: Reply, board: str) -> Reply:
        if fault := self.on_finals(board):
            return fault
        times = {name: measured(at({"source": s})) for name, s in request["sources"].items()}
        rounds = {name: [m["latency_us"]] * request["rounds"] for name, m in times.items()}
        return {"outcome": "ok", "measurements": times, "rounds": rounds, "provider": None}


class Workers(FakeWorkers):
    """Workers of one board, or those that compile."""

    def __init__(self, host: Host, board: str) -> None:
        super().__init__()
        self.host, self.board = host, board

    def answer(self, request: Reply) -> Reply:
        assert not self.closed
        reply: Reply = getattr(self.host, request["kind"])(request, self.board)
        return reply


def at(request: Reply) -> tuple[int, int]:
    found = re.search(r"x=(\d+) y=(\d+)", request["source"]["text"])
    assert found
    return int(found[1]), int(found[2])


def measured(point: tuple[int, int]) -> dict[str, Any]:
    time = 100.0 + 10 * (point[0] - 2) ** 2 + 10 * (point[1] - 1) ** 2
    return {"latency_us": time, "p20_us": time, "p80_us": time, "count": 5}


@pytest.fixture
def database() -> Iterator[Database]:
    digests = {name: template.digest for name, template in CATALOG.templates.items()}
    with Database.open("sqlite://", digests=digests) as opened:
        yield opened


@pytest.fixture
def run(
    database: Database, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> Callable[..., list[TuneResult]]:
    def run(host: Host, *, problems: list[Problem] = PROBLEMS, **options: Any) -> list[TuneResult]:
        monkeypatch.setattr(tuner, "Pool", host.pool)
        options = {
            "database": database, "effort": EFFORT, "catalog": CATALOG, "boards": host.boards,
            **options,
        }  # fmt: skip
        return tune(problems, GPU, **options)

    return run


Runs = Callable[..., list[TuneResult]]


def test_every_problem_is_tuned_on_one_device_and_every_device_works(
    run: Runs, database: Database
) -> None:
    host = Host(3)
    results = run(host)
    assert [result.problem for result in results] == PROBLEMS
    assert {result.status for result in results} == {"improved"}
    assert {(r.best.config["x"], r.best.config["y"]) for r in results} == {(2, 1)}
    used: dict[Problem, set[str]] = {}
    for record in database.trials():
        used.setdefault(record.problem, set()).add(record.environment["board"])
    assert [len(used[problem]) for problem in PROBLEMS] == [1] * 5
    assert set().union(*used.values()) == {"0", "1", "2"}
    assert all(r.best.environment["board"] in used[r.problem] for r in results)
    (noted,) = database.runs()
    assert noted["status"] == "done"
    assert all(pool.closed for pool in host.pools)


def test_a_source_is_compiled_once_for_all_devices(run: Runs) -> None:
    host = Host(3)
    run(host)
    assert len(host.compiled) == len(set(host.compiled)) == SOURCES
    assert sum(map(len, host.evaluated.values())) == 5 * SOURCES


def test_more_devices_leave_the_same_records(run: Runs) -> None:
    def told(devices: int) -> Counter[tuple[Any, ...]]:
        with Database.open("sqlite://") as fresh:
            run(Host(devices), database=fresh)
            return Counter(
                (r.problem, r.config, r.outcome, r.latency_us, tuple(sorted(r.environment)))
                for r in [*fresh.trials(), *fresh.bests()]
            )

    one, several = told(1), told(4)
    assert one == several
    assert sum(one.values()) == 5 * CONFIGS + 5


def test_more_devices_than_problems_are_not_started(run: Runs) -> None:
    host = Host(2)
    host.boards += [Board(index=9, device=GPU, visible="9")]
    results = run(host, problems=PROBLEMS[:2])
    assert [result.status for result in results] == ["improved"] * 2
    assert {pool.board for pool in host.pools} == {"", "0", "1"}


def test_events_name_the_device_and_come_in_the_callers_thread(run: Runs) -> None:
    events: list[tuple[Event, threading.Thread]] = []
    run(Host(3), on_event=lambda event: events.append((event, threading.current_thread())))
    assert {thread for _, thread in events} == {threading.current_thread()}
    for index in range(5):
        ours = [event for event, _ in events if event.index == index]
        assert len({event.device for event in ours}) == 1
        assert [ours[0].kind, ours[-1].kind] == ["start", "done"]
        trials = [event.done for event in ours if event.kind == "trial"]
        assert trials == list(range(1, CONFIGS + 1))
    assert {event.device for event, _ in events} == {"0", "1", "2"}


# Devices that fail ------------------------------------------------------------------------------


def test_a_device_that_never_works_leaves_its_problem_to_the_others(
    run: Runs, database: Database
) -> None:
    host, events = Host(3), []
    host.dead.add("1")
    results = run(host, on_event=events.append)
    assert [result.status for result in results] == ["improved"] * 5
    (lost,) = [event for event in events if event.kind == "lost"]
    assert lost.device == "1"
    assert re.search(r"device 1 is used no more: .*3 fresh worker.*SIGSEGV", lost.message)
    assert {r.environment["board"] for r in database.trials()} <= {"0", "2"}
    assert database.runs()[0]["status"] == "done"


def test_a_device_lost_in_the_middle_takes_nothing_with_it(run: Runs, database: Database) -> None:
    host = Host(2)

    def die(board: str) -> Reply | None:
        if board == "1" and len(host.evaluated["1"]) == 5:
            host.dead.add("1")
            return {"outcome": "crash", "reason": "killed by SIGBUS"}
        return None

    host.on_evaluate = die
    results = run(host)
    assert [result.status for result in results] == ["improved"] * 5
    assert [result.trials for result in results] == [CONFIGS] * 5
    assert len(host.evaluated["1"]) == 5
    # The other goes on behind what this one finished.
    finished = host.evaluated["1"][:4]
    assert not set(finished) & set(host.evaluated["0"])
    crashed = {r.source_digest: r for r in database.trials() if r.outcome == "crash"}
    assert len(crashed) == 1
    assert all("killed by SIGBUS" in record.reason for record in crashed.values())


def test_a_problem_that_comes_back_last_is_taken_by_who_was_done(run: Runs) -> None:
    host, first_done = Host(2), threading.Event()

    def die(board: str) -> Reply | None:
        if board == "1":
            assert first_done.wait(120)
            host.dead.add("1")
            return {"outcome": "timeout", "reason": "no answer in 9 s"}
        return None

    def note(event: Event) -> None:
        if event.kind == "done":
            first_done.set()

    host.on_evaluate = die
    results = run(host, problems=PROBLEMS[:2], on_event=note)
    assert [result.status for result in results] == ["improved"] * 2


def test_a_device_that_fails_in_the_finals_is_used_no_more(run: Runs) -> None:
    host = Host(2)

    def die(board: str) -> Reply | None:
        if board == "0":
            host.dead.add("0")
            return {"outcome": "crash", "reason": "killed by SIGBUS"}
        return None

    host.on_finals = die
    results = run(host)
    assert [result.status for result in results] == ["improved"] * 5
    assert {result.best.environment["board"] for result in results} == {"1"}
    assert len({problem for problem, _ in host.evaluated["0"]}) == 1


def test_finals_that_fail_on_a_device_that_works_are_reported(run: Runs) -> None:
    host = Host(2)
    host.on_finals = lambda board: {"outcome": "crash", "reason": "killed by SIGKILL"}
    results = run(host)
    assert [result.status for result in results] == ["partial"] * 5
    assert all("SIGKILL" in result.reason for result in results)


def test_no_device_that_works_is_an_error(run: Runs, database: Database) -> None:
    host = Host(3)
    host.dead |= {"0", "1", "2"}
    with pytest.raises(errors.WorkerError, match="3 fresh worker processes"):
        run(host)
    assert database.trials() == []
    assert all(pool.closed for pool in host.pools)


# Ends -------------------------------------------------------------------------------------------


def test_ctrl_c_returns_what_there_is_and_the_next_run_goes_on(
    run: Runs, database: Database
) -> None:
    seen: list[Record] = []

    def interrupt(event: Event) -> None:
        if event.record is not None and event.kind == "trial":
            seen.append(event.record)
            if len(seen) == 30:
                raise KeyboardInterrupt

    host = Host(2)
    results = run(host, on_event=interrupt)
    before = database.trials()
    assert all(pool.closed for pool in host.pools)
    assert [result.problem for result in results] == PROBLEMS
    assert "partial" in {result.status for result in results}
    assert sum(result.trials for result in results) == len(before) >= 30
    assert database.runs()[0]["status"] == "interrupted"
    again = Host(2)
    assert {result.status for result in run(again)} == {"improved"}
    assert database.trials()[: len(before)] == before
    assert len(database.trials()) == 5 * CONFIGS


def test_what_goes_wrong_in_a_thread_is_raised(run: Runs, database: Database) -> None:
    def err(board: str) -> Reply | None:
        raise RuntimeError("a mistake of ours")

    host = Host(2)
    host.on_evaluate = err
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(host)
    assert all(pool.closed for pool in host.pools)
    assert database.runs()[0]["status"] == "failed"


def test_what_no_device_could_store_is_told_in_the_end(
    run: Runs, database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(self: Database, *values: Any) -> None:
        raise errors.DatabaseError("disk full.")

    monkeypatch.setattr(Database, "add", full)
    host = Host(2)
    with pytest.raises(errors.DatabaseError, match="could not be stored: disk full"):
        run(host)
    assert all(pool.closed for pool in host.pools)
    assert database.trials() == []


def test_a_missing_compiler_ends_the_run_with_its_own_error(run: Runs, database: Database) -> None:
    host = Host(2)
    host.compile_fault = {"outcome": "compile_error", "raise": "ToolchainMissing", "reason": "none"}
    with pytest.raises(errors.ToolchainMissing, match="none"):
        run(host)
    assert database.trials() == []
    assert len(host.compiled) <= SOURCES


def test_a_locked_device_is_named(
    run: Runs, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(2)
    with boards.held(host.boards[1:], cache_dir, wait_s=0.1):
        monkeypatch.setattr(
            tuner, "held", lambda wanted, root: boards.held(wanted, root, wait_s=0.1)
        )
        with pytest.raises(errors.CacheError, match=r"device 1: .* is being tuned"):
            run(host)
    assert host.pools == []
