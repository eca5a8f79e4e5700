"""Measuring winners between their shapes: what is measured, stored, gone on with and concluded."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.workers import FakeWorkers

from autoflash import device, errors
from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS
from autoflash.dispatch_table import Family
from autoflash.problem import MAX_DISTANCE, Problem
from autoflash.record import Measurement, Record
from autoflash.runtime.dispatch import Dispatcher, Learned
from autoflash.tuning import finals
from autoflash.tuning import probes as probe_shapes
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.generalise import Generalised, generalise
from autoflash.tuning.timing import policy_for

DATA = Path(__file__).parents[1] / "data"
CATALOG = Catalog.load(DATA / "plane")
GPU = KNOWN_GPUS["sm90"]
PROBLEM = Problem.parse("b2s1024h8d64c-bfloat16")
DEFAULT = Config.of("triton/plane", {"x": 6, "y": 3, "same": "a"})
WINNER = Config.of("triton/plane", {"x": 2, "y": 1, "same": "a"})
EFFORT = dataclasses.replace(EFFORTS["quick"], seconds=None)

Reply = Mapping[str, Any]


def times(problem: Problem, x: int) -> float:
    """The winner is a fifth faster from 1024 keys on, and slower below."""
    return 100.0 if x == 6 else 80.0 if problem.seqlen_k >= 1024 else 120.0


class Workers(FakeWorkers):
    """Workers that answer at once, by the numbers in the source and the problem."""

    def __init__(self, latency_us: Callable[[Problem, int], float] = times) -> None:
        super().__init__()
        self.latency_us = latency_us
        self.faults: Callable[[Problem, int], Reply | None] = lambda problem, x: None
        self.turn_faults: deque[Reply] = deque()
        self.compile_faults: dict[int, Reply] = {}
        self.interrupt_after: int | None = None

    def answer(self, request: Reply) -> Reply:
        if self.seen["finals"] == self.interrupt_after:
            raise KeyboardInterrupt
        return super().answer(request)

    def hello(self, request: Reply) -> Reply:
        return {"outcome": "ok", "environment": {"torch": "pretended"}}

    def compile(self, request: Reply) -> Reply:
        ok = {"outcome": "ok", "resources": {"compile_s": 0.5, "binary_bytes": 10}}
        return self.compile_faults.get(x_of(request["source"]), ok)

    def evaluate(self, request: Reply) -> Reply:
        problem, x = Problem.from_dict(request["problem"]), x_of(request["source"])
        if (fault := self.faults(problem, x)) is not None:
            return fault
        # Alone, everything takes longer than in turns: those times must not be mixed.
        time = 1.5 * self.latency_us(problem, x)
        return {"outcome": "ok", "measurement": measurement(time), "error_ratio": 0.5}

    def finals(self, request: Reply) -> Reply:
        if self.turn_faults:
            return self.turn_faults.popleft()
        assert request["torch"] is False
        problem = Problem.from_dict(request["problem"])
        taken = {n: self.latency_us(problem, x_of(s)) for n, s in request["sources"].items()}
        return {
            "outcome": "ok",
            "measurements": {name: measurement(time) for name, time in taken.items()},
            "rounds": {name: [time] * 5 for name, time in taken.items()},
            "provider": None,
        }


def x_of(source: Reply) -> int:
    found = re.search(r"x=(\d+)", source["text"])
    assert found
    return int(found[1])


def measurement(time: float) -> dict[str, Any]:
    return {"latency_us": time, "p20_us": time, "p80_us": time, "count": 5}


def winner(
    problem: Problem = PROBLEM, config: Config = WINNER, catalog: Catalog = CATALOG, **changes: Any
) -> Record:
    fields: dict[str, Any] = {
        "problem": problem,
        "config": config,
        "template_digest": catalog.get(config.template).digest,
        "device": GPU,
        "outcome": "ok",
        "policy": policy_for(GPU).id,
        "measurement": Measurement.from_dict(measurement(80.0)),
    }
    return Record(**{**fields, **changes})


@pytest.fixture
def database() -> Iterator[Database]:
    digests = {name: template.digest for name, template in CATALOG.templates.items()}
    with Database.open("sqlite://", digests=digests) as opened:
        yield opened


def run(database: Database, workers: Workers, *winners: Record, **options: Any) -> Generalised:
    options = {"effort": EFFORT, "catalog": CATALOG, "count": 20, **options}
    (found,) = generalise(
        winners or (winner(),), GPU, database=database, workers=workers, **options
    )
    return found


def test_the_winner_serves_where_it_wins_and_the_default_elsewhere(database: Database) -> None:
    found = run(database, Workers())
    assert (found.status, found.measured, found.wanted, found.reason) == ("improved", 20, 20, "")
    made = found.table
    assert made is not None
    assert database.tables() == [made]
    assert made.family == Family.of(PROBLEM)
    assert sum(probe.held_out for probe in made.probes) == 4
    for probe in made.probes:
        leaf = made.leaf(probe.problem)
        if not probe.held_out:
            assert leaf is not None
            long = probe.problem.seqlen_k >= 1024
            assert made.config_of(leaf) == (WINNER if long else None), probe.problem.name
    assert made.regret("table", held_out=False).worst == 0.0
    near = [p for p in made.probes if PROBLEM.distance(p.problem) <= MAX_DISTANCE]
    assert 0 < len(near) < len(made.probes)
    assert {made.time_us("nearest", p) / made.time_us("table", p) for p in near} == {1.0, 1.2}
    assert made.regret("default", held_out=False).worst == pytest.approx(0.25)
    # What was measured is what is served.
    chosen = Dispatcher(GPU, Learned((), database.tables()), CATALOG, missing=lambda *_: None)
    short = next(p.problem for p in made.probes if p.problem.seqlen_k < 1024 and not p.held_out)
    served = [next(chosen.choices(p)) for p in (dataclasses.replace(PROBLEM, batch=3), short)]
    assert [(choice.rule, choice.config) for choice in served] == [
        ("table", WINNER), ("table", DEFAULT),
    ]  # fmt: skip


def test_every_time_of_a_shape_is_stored_and_of_the_same_turns(database: Database) -> None:
    made = run(database, Workers(), count=10).table
    assert made is not None
    trials = database.trials()
    assert len(trials) == 20
    assert {record.policy for record in trials} == {made.policy} != {policy_for(GPU).id}
    assert made.policy.startswith(policy_for(GPU).id)
    by_shape = Counter((record.problem, record.created) for record in trials)
    assert set(by_shape.values()) == {2}
    assert all(r.latency_us == times(r.problem, r.config["x"]) for r in trials)
    assert database.runs()[0]["status"] == "done"


def test_what_was_measured_is_not_measured_again(database: Database) -> None:
    first = run(database, Workers(), count=10).table
    again = Workers()
    second = run(database, again, count=10).table
    assert again.seen == {"hello": 1}
    assert first is not None
    assert second is not None
    assert second.leaves == first.leaves
    more = Workers()
    assert run(database, more, count=13).measured == 13
    assert more.seen["finals"] == 3
    # Another winner: its times are compared with those of the same turns only.
    other = winner(config=Config.of("triton/plane", {"x": 1, "y": 1, "same": "a"}))
    third = Workers()
    run(database, third, winner(), other, count=10)
    assert third.seen["finals"] == 10


def test_ctrl_c_keeps_what_there_is_and_the_next_run_goes_on(database: Database) -> None:
    workers = Workers()
    workers.interrupt_after = 9
    found = run(database, workers)
    assert (found.status, found.measured, found.wanted) == ("partial", 8, 20)
    assert "interrupted" in found.reason
    assert found.table is not None
    assert database.runs()[0]["status"] == "interrupted"
    after = Workers()
    assert run(database, after).status == "improved"
    assert after.seen["finals"] == 12


def test_too_few_shapes_give_no_table(database: Database) -> None:
    workers = Workers()
    workers.interrupt_after = 4
    found = run(database, workers)
    assert (found.status, found.table, found.measured) == ("invalid", None, 3)
    assert "5 shapes are needed" in found.reason
    assert database.tables() == []


def test_time_that_is_used_up_ends_it(database: Database) -> None:
    workers = Workers()
    found = run(database, workers, max_seconds=1e-6)
    assert (found.status, found.measured) == ("invalid", 0)
    assert "time was used up" in found.reason
    assert workers.seen["evaluate"] == 0


def test_where_nothing_beats_the_default_the_table_says_so(database: Database) -> None:
    found = run(database, Workers(lambda problem, x: 100.0 if x == 6 else 99.8))
    assert found.status == "unimproved"
    assert found.table is not None
    assert [leaf.config for leaf in found.table.leaves] == [None]


def test_a_wrong_or_crashing_config_has_no_time_and_serves_no_shape(database: Database) -> None:
    workers = Workers(lambda problem, x: 100.0 if x == 6 else 50.0)
    crash = {"outcome": "crash", "reason": "killed by SIGSEGV"}
    wrong = {"outcome": "wrong_result", "reason": "out[0] is nan"}
    workers.faults = lambda problem, x: (
        None if x == 6 else crash if problem.seqlen_q < 64 else wrong
    )
    found = run(database, workers)
    assert found.status == "unimproved"
    assert found.table is not None
    assert all(probe.times_us.count(None) == 1 for probe in found.table.probes)
    outcomes = Counter(record.outcome for record in database.trials())
    assert outcomes["ok"] == 20
    assert outcomes["crash"] > 0
    assert outcomes["wrong_result"] > 0
    # Each crash is tried again in a fresh process; after two shapes the config is barred.
    assert outcomes["crash"] + outcomes["wrong_result"] < 20
    assert workers.seen["hello"] == 1 + 2 * outcomes["crash"]


def test_a_default_that_does_not_work_leaves_its_shape_out(database: Database) -> None:
    workers = Workers()
    broken = {"outcome": "runtime_error", "reason": "no"}
    workers.faults = lambda problem, x: broken if x == 6 and problem.seqlen_q < 64 else None
    found = run(database, workers)
    assert 5 < found.measured < 20
    assert found.status == "improved"
    assert found.table is not None
    assert all(probe.problem.seqlen_q >= 64 for probe in found.table.probes)


def test_turns_that_always_fail_leave_their_shape_to_the_next_run(database: Database) -> None:
    workers = Workers()
    tries = finals.ATTEMPTS * finals.TRIES
    workers.turn_faults.extend([{"outcome": "timeout", "reason": "no answer"}] * tries)
    found = run(database, workers)
    assert (found.status, found.measured) == ("partial", 19)
    assert found.reason.endswith("in turns: no answer; run it again to go on")
    assert {r.outcome for r in database.trials()[:2]} == {"timeout"}
    # Which of them it was is not known: none is barred, and all are tried again.
    after = Workers()
    assert run(database, after).measured == 20
    assert after.seen["finals"] == 1


def test_who_makes_the_turns_fail_is_left_out_of_them(database: Database) -> None:
    workers = Workers(lambda problem, x: 100.0 if x == 6 else 50.0)
    wrong = {"outcome": "wrong_result", "reason": "late", "wrong": {"1": "late"}, "exiting": True}
    workers.turn_faults.extend([wrong] * finals.TRIES)
    found = run(database, workers)
    assert found.measured == 20
    assert found.table is not None
    assert [probe.times_us.count(None) for probe in found.table.probes].count(1) == 1
    (guilty,) = database.trials(outcome="wrong_result")
    assert (guilty.config, guilty.reason) == (WINNER, "in the finals: late")


def test_a_crash_that_was_anothers_fault_is_forgiven(database: Database) -> None:
    workers = Workers()
    crashes = deque([{"outcome": "crash", "reason": "killed by SIGSEGV"}])
    workers.faults = lambda problem, x: crashes.popleft() if crashes else None
    found = run(database, workers)
    assert (found.measured, found.status) == (20, "improved")
    assert {record.outcome for record in database.trials()} == {"ok"}
    assert workers.seen["hello"] == 2


def test_a_full_disk_waits_for_room(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    add, full = Database.add, [errors.DatabaseError("disk full")] * 3

    def added(self: Database, *values: Any) -> None:
        if full:
            raise full.pop()
        add(self, *values)

    monkeypatch.setattr(Database, "add", added)
    assert run(database, Workers()).status == "improved"
    assert len(database.trials()) == 40


def test_a_kernel_that_does_not_compile_is_a_trial(database: Database) -> None:
    workers = Workers()
    workers.compile_faults[2] = {"outcome": "compile_error", "reason": "no"}
    found = run(database, workers)
    assert found.status == "unimproved"
    assert Counter(r.outcome for r in database.trials()) == {"ok": 20, "compile_error": 20}


def test_families_take_turns(database: Database) -> None:
    workers = Workers()
    workers.interrupt_after = 13
    other = dataclasses.replace(PROBLEM, causal=False)
    found = generalise(
        [winner(), winner(other)], GPU, database=database, workers=workers, effort=EFFORT,
        catalog=CATALOG, count=20,
    )  # fmt: skip
    assert [each.measured for each in found] == [6, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "predicted", "measurement": None, "predicted_us": 5.0},
        {"template_digest": "former"},
        {"device": KNOWN_GPUS["sm80"]},
        {"policy": "another"},
    ],
)
def test_only_winners_measured_here_and_now_count(
    database: Database, changes: dict[str, Any]
) -> None:
    with pytest.raises(errors.InvalidInput, match="there is no winner to generalise"):
        run(database, Workers(), winner(**changes))


@pytest.mark.parametrize(("option", "value"), [("count", 4), ("max_seconds", 0.0)])
def test_a_limit_that_cannot_be_meant_is_named(
    database: Database, option: str, value: float
) -> None:
    with pytest.raises(errors.InvalidInput, match=f"={value}: it must be"):
        run(database, Workers(), **{option: value})


def test_an_absent_device_is_named(database: Database) -> None:
    with pytest.raises(errors.InvalidInput, match="is not here"):
        generalise([winner()], KNOWN_GPUS["sm120"], database=database)


def test_real_kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # The default sleeps 3 ms a call; the winner does not. A twin is timed once and is as fast.
    catalog = Catalog.load(DATA.parent / "faults" / "templates")
    cpu = device.for_arch("cpu")
    small = probe_shapes._Range(rows=(3, 6), heads=(0, 2), call_s=1.0, bytes=1 << 30)
    monkeypatch.setattr(probe_shapes, "_CPU", small)
    values = {"delay_us": 0, "fault": "none", "twin": 0, "name": "a"}
    fast, twin = (Config.of("cpp/naive", {**values, "twin": n}) for n in (0, 1))
    skips = Config.of("cpp/naive", {**values, "fault": "skip"})
    tuned = [Problem.parse(f"b1s{n}h2/2d16c-float32") for n in (48, 33, 20)]
    records = [
        winner(problem, config, catalog, device=cpu, policy=policy_for(cpu).id)
        for problem, config in zip(tuned, (fast, twin, skips), strict=True)
    ]  # fmt: skip
    effort = dataclasses.replace(EFFORT, timing_ms=5.0, finals_ms=5.0)
    digests = {name: template.digest for name, template in catalog.templates.items()}
    with Database.open("sqlite://", digests=digests) as database:
        (found,) = generalise(
            records, cpu, database=database, effort=effort, catalog=catalog, count=5
        )
        trials = database.trials()
        stored = database.tables(cpu.key)
    assert found.status == "improved"
    assert found.table is not None
    assert stored == [found.table]
    assert [found.table.config_of(leaf) for leaf in found.table.leaves] == [fast]
    assert found.table.regret("default", held_out=True).worst > 0.5
    assert found.table.regret("table", held_out=True).worst < 0.5
    by_config = {record.config: record for record in trials if record.problem == trials[0].problem}
    assert by_config[skips].outcome == "wrong_result"
    assert by_config[twin].measurement == by_config[fast].measurement
    assert found.table.environment["torch"]
