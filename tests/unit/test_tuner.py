"""The tuning loop: what it tries, stores, skips, resumes and concludes, with pretended workers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from support.plane import (
    CATALOG,
    EFFORT,
    FEASIBLE,
    GPU,
    OTHER,
    PROBLEM,
    Workers,
    bowl,
    config,
    opened,
    run,
)

from autoflash import errors
from autoflash.codegen.catalog import installed
from autoflash.database import Database
from autoflash.device import KNOWN_GPUS, for_arch
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.tuning import tuner
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.run import Run
from autoflash.tuning.tuner import Event, tune


@pytest.fixture
def database() -> Iterator[Database]:
    with opened() as found:
        yield found


# What is found ----------------------------------------------------------------------------------


def test_a_small_space_is_swept_and_the_fastest_wins(database: Database) -> None:
    workers = Workers()
    (result,) = run(database, workers)
    assert (result.status, result.trials) == ("improved", FEASIBLE)
    assert result.best.config == config(2, 1)
    assert result.best.measurement.latency_us == 100.0
    assert result.best.default_us == bowl(6, 3)
    assert (result.best.torch_us, result.best.torch_provider) == (150.0, "cudnn")
    assert result.best.environment == {"torch": "pretended"}
    assert result.outcomes["infeasible"] == 80 - FEASIBLE
    assert result.outcomes["ok"] + result.outcomes["slow"] == FEASIBLE
    assert workers.closed
    assert database.bests() == [result.best]
    assert len(database.trials()) == FEASIBLE
    (noted,) = database.runs()
    assert noted["status"] == "done"


def test_the_default_is_tried_first_and_then_the_seeds(database: Database) -> None:
    workers = Workers()
    run(database, workers)
    assert workers.evaluated[:2] == [(6, 3), (5, 3)]


def test_equal_sources_are_compiled_and_run_once(database: Database) -> None:
    workers = Workers()
    run(database, workers)
    assert len(workers.evaluated) == len(set(workers.evaluated)) == 39
    twins = [r for r in database.trials() if r.config["x"] == 0 and r.config["y"] == 2]
    assert {r.config["same"] for r in twins} == {"a", "b"}
    assert twins[0].measurement == twins[1].measurement


def test_problems_with_equal_traits_share_compilations(database: Database) -> None:
    workers = Workers()
    first, second = run(database, workers, PROBLEM, OTHER)
    assert (first.status, second.status) == ("improved", "improved")
    assert len(workers.compiled) == 39
    assert len(workers.evaluated) == 78


def test_the_nearest_winner_is_tried_right_after_the_default(database: Database) -> None:
    run(database, Workers(lambda x, y: 50.0 + x + 10 * y))
    workers = Workers()
    run(database, workers, OTHER)
    assert workers.evaluated[:3] == [(6, 3), (0, 0), (5, 3)]


def test_a_default_that_is_best_stays(database: Database) -> None:
    workers = Workers(lambda x, y: 100.0 + abs(x - 6) + abs(y - 3))
    (result,) = run(database, workers)
    assert result.status == "unimproved"
    assert result.best.config == config(6, 3)
    assert result.best.default_us == result.best.latency_us == 100.0


def test_a_gain_within_the_noise_is_none(database: Database) -> None:
    workers = Workers(lambda x, y: 100.0 - 0.5 * (x == 2) * (y == 1), noise=0.02)
    (result,) = run(database, workers)
    assert result.status == "unimproved"
    assert result.best.config == config(6, 3)


def test_an_equal_gain_without_noise_is_one(database: Database) -> None:
    workers = Workers(lambda x, y: 100.0 - 1.5 * (x == 2) * (y == 1))
    (result,) = run(database, workers)
    assert (result.status, result.best.config) == ("improved", config(2, 1))


def test_the_same_seed_tries_the_same_in_the_same_order(database: Database) -> None:
    def order(seed: int) -> list[tuple[int, int]]:
        workers = Workers()
        with Database.open("sqlite://") as fresh:
            run(fresh, workers, seed=seed)
        return workers.evaluated

    assert order(1) == order(1)
    assert order(1) != order(2)


# What goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["wrong_result", "runtime_error", "timeout", "crash"])
def test_a_candidate_that_fails_costs_one_trial(database: Database, outcome: str) -> None:
    workers = Workers()
    workers.faults[2, 1] = {"outcome": outcome, "reason": "because"}
    (result,) = run(database, workers)
    assert result.status == "improved"
    assert result.best.config in (config(3, 1), config(1, 1), config(2, 0), config(2, 2))
    failed = [r for r in database.trials() if r.outcome == outcome]
    # A crash in a process that ran others before is tried once more, in a fresh one.
    reasons = ["to be run again: because"] * (outcome == "crash") + ["because"]
    assert [(r.config, r.reason) for r in failed] == [(config(2, 1), each) for each in reasons]
    # After a death a canary runs before the device is trusted again.
    deaths = {"timeout": 1, "crash": 2}.get(outcome, 0)
    assert workers.seen["hello"] == 1 + deaths
    assert result.trials == FEASIBLE


def test_what_the_compiler_says_is_recorded_and_not_run(database: Database) -> None:
    workers = Workers()
    workers.compile_faults[2, 1] = {"outcome": "compile_error", "reason": "no\nmore"}
    workers.compile_faults[3, 1] = {"outcome": "timeout", "reason": "no answer in 9 s"}
    workers.resources[1, 1] = {"smem_bytes": 300_000}
    workers.resources[2, 0] = {"registers": 255, "num_threads": 512}
    workers.resources[2, 2] = {"spill_bytes": 4000}
    (result,) = run(database, workers)
    by_config = {r.config: r for r in database.trials()}
    assert by_config[config(2, 1)].outcome == "compile_error"
    assert by_config[config(2, 1)].reason == "compiling: no"
    assert by_config[config(3, 1)].outcome == "timeout"
    for point in ((1, 1), (2, 0), (2, 2)):
        assert by_config[config(*point)].outcome == "over_resources"
    assert "300000 bytes" in by_config[config(1, 1)].reason
    assert not {(2, 1), (3, 1), (1, 1), (2, 0), (2, 2)} & set(workers.evaluated)
    assert result.status == "improved"


def test_a_seed_that_spills_is_run_all_the_same(database: Database) -> None:
    workers = Workers()
    workers.resources.update({(x, y): {"spill_bytes": 4000} for x in range(8) for y in range(5)})
    (result,) = run(database, workers)
    assert workers.evaluated == [(6, 3), (5, 3)]
    assert result.status == "improved"


def test_a_default_that_fails_leaves_the_best_of_the_others(database: Database) -> None:
    workers = Workers()
    workers.faults[6, 3] = {"outcome": "wrong_result", "reason": "nan"}
    (result,) = run(database, workers)
    assert (result.status, result.best.default_us) == ("improved", None)


def test_nothing_valid_says_why(database: Database) -> None:
    workers = Workers()
    workers.faults.update(
        {(x, y): {"outcome": "wrong_result", "reason": "nan"} for x in range(8) for y in range(5)}
    )
    (result,) = run(database, workers)
    assert (result.status, result.best) == ("invalid", None)
    assert result.outcomes["wrong_result"] == FEASIBLE
    assert "wrong_result: nan" in result.reason
    assert database.bests() == []


def test_a_problem_that_no_template_takes_is_invalid_and_the_next_is_tuned(
    database: Database,
) -> None:
    wide = Problem.parse("b2s1024h8d256c-bfloat16")
    first, second = run(database, Workers(), wide, PROBLEM)
    assert first.status == "invalid"
    assert "head_dim is at most 128" in first.reason
    assert second.status == "improved"


def test_a_missing_compiler_ends_the_run_with_its_own_error(database: Database) -> None:
    workers = Workers()
    workers.compile_faults.update(
        {
            (x, y): {"outcome": "compile_error", "raise": "ToolchainMissing", "reason": "no nvcc"}
            for x in range(8)
            for y in range(5)
        }
    )
    with pytest.raises(errors.ToolchainMissing, match="no nvcc"):
        run(database, workers)
    assert len(workers.compiled) < 39  # not once for each config
    assert database.trials() == []
    assert database.runs()[0]["status"] == "failed"


def test_a_device_on_which_nothing_runs_ends_the_run(database: Database) -> None:
    workers = Workers()
    workers.hello_faults += [{"outcome": "crash", "reason": "killed by SIGSEGV"}] * 20
    with pytest.raises(errors.WorkerError, match=r"3 fresh worker .* killed by SIGSEGV"):
        run(database, workers)


def test_a_device_lost_in_the_middle_ends_the_run_and_keeps_the_trials(database: Database) -> None:
    workers = Workers()
    workers.faults[5, 3] = {"outcome": "crash", "reason": "killed by SIGSEGV"}

    def lose() -> None:
        workers.hello_faults += [{"outcome": "timeout", "reason": "no answer"}] * 20

    workers.on_evaluate = lose
    with pytest.raises(errors.WorkerError, match="no answer"):
        run(database, workers)
    assert [r.outcome for r in database.trials()] == ["ok", "crash"]


def test_finals_that_fail_once_are_repeated(database: Database) -> None:
    workers = Workers()
    workers.finals_faults.append({"outcome": "crash", "reason": "killed by SIGKILL"})
    (result,) = run(database, workers)
    assert result.status == "improved"


def test_finals_that_keep_failing_leave_no_winner(database: Database) -> None:
    workers = Workers()
    workers.finals_faults += [{"outcome": "crash", "reason": "killed by SIGKILL"}] * 6
    (result,) = run(database, workers)
    assert (result.status, result.best.config) == ("partial", config(2, 1))
    assert "SIGKILL" in result.reason
    assert database.bests() == []


# Budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 5])
def test_max_trials_counts_every_record(database: Database, most: int) -> None:
    workers = Workers()
    (result,) = run(database, workers, max_trials=most)
    assert result.trials == len(workers.evaluated) == most
    assert workers.evaluated[0] == (6, 3)


def test_time_that_is_up_leaves_a_default_measured(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 30))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    workers = Workers()
    (result,) = run(database, workers, effort=dataclasses.replace(EFFORT, seconds=100.0))
    assert 1 <= result.trials < 10
    assert (6, 3) in workers.evaluated
    assert result.status in ("improved", "unimproved")


def test_problems_that_max_seconds_does_not_reach_are_partial(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 30))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    third = Problem.parse("b2s4096h8d64c-bfloat16")
    results = run(database, Workers(), PROBLEM, OTHER, third, max_seconds=200.0)
    assert results[0].status != "partial"
    assert (results[-1].status, results[-1].trials) == ("partial", 0)
    assert "used up" in results[-1].reason


# Going on ---------------------------------------------------------------------------------------


def test_a_second_run_goes_on_where_the_first_stopped(database: Database) -> None:
    first, second = Workers(), Workers()
    run(database, first, max_trials=10)
    (result,) = run(database, second)
    assert not set(first.evaluated) & set(second.evaluated)
    assert len(first.evaluated) + len(second.evaluated) == 39
    assert (result.status, result.trials) == ("improved", FEASIBLE)
    assert result.best.config == config(2, 1)


def test_a_run_with_nothing_left_runs_nothing(database: Database) -> None:
    (before,) = run(database, Workers())
    workers = Workers()
    (result,) = run(database, workers)
    assert (result.status, result.best) == (before.status, before.best)
    assert set(workers.seen) == {"hello"}


def test_a_run_killed_before_its_finals_only_runs_those(database: Database) -> None:
    (done,) = run(database, Workers())
    with Database.open("sqlite://") as killed:
        for record in database.trials():
            killed.add(record)
        workers = Workers()
        (result,) = run(killed, workers)
    assert result.best.config == done.best.config
    assert workers.seen == Counter(hello=1, finals=1)


def test_trials_of_another_template_text_are_not_believed(database: Database) -> None:
    run(database, Workers(), max_trials=5)
    for record in database.trials():
        stale = dataclasses.replace(record, template_digest="0" * 16, problem=OTHER)
        database.add(stale)
    workers = Workers()
    (result,) = run(database, workers, OTHER)
    assert result.trials == FEASIBLE
    assert len(workers.evaluated) == 39


def test_ctrl_c_returns_what_there_is_and_the_next_run_goes_on(database: Database) -> None:
    workers = Workers()

    def interrupt() -> None:
        if len(workers.evaluated) == 7:
            raise KeyboardInterrupt

    workers.on_evaluate = interrupt
    results = run(database, workers, PROBLEM, OTHER)
    assert [result.status for result in results] == ["partial", "partial"]
    assert (results[0].trials, results[1].trials) == (7, 0)
    assert results[0].best.latency_us == min(bowl(*point) for point in workers.evaluated)
    assert workers.closed
    assert database.runs()[0]["status"] == "interrupted"
    assert database.bests() == []
    again = Workers()
    results = run(database, again, PROBLEM, OTHER)
    assert [result.status for result in results] == ["improved", "improved"]
    assert len(again.evaluated) == 2 * 39 - 7


def test_the_stored_winner_defends_its_title(database: Database) -> None:
    # Single timings made another config look 20% faster than the winner of the finals.
    run(database, Workers())
    lucky = dataclasses.replace(
        next(r for r in database.trials() if r.config == config(4, 4)),
        measurement=dataclasses.replace(database.bests()[0].measurement, latency_us=80.0),
        created="2100-01-01T00:00:00Z",
    )
    database.add(lucky)
    database.add(dataclasses.replace(lucky, config=config(7, 4), outcome="crash"))
    with Database.open("sqlite://") as other:
        for record in database.trials():
            if record.config != config(3, 3):
                other.add(record)
        other.set_best(database.bests()[0])
        (result,) = run(other, Workers())
    assert result.best.config == config(2, 1)


# Events, arguments, plans -----------------------------------------------------------------------


def test_events_tell_the_whole_story(database: Database) -> None:
    events: list[Event] = []
    (first, second) = run(database, Workers(), PROBLEM, OTHER, on_event=events.append)
    kinds = [event.kind for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert kinds.count("done") == 2
    assert {event.index for event in events} == {0, 1}
    assert {event.total_problems for event in events} == {2}
    trials = [event for event in events if event.kind == "trial" and event.problem == PROBLEM]
    assert [event.done for event in trials] == list(range(1, FEASIBLE + 1))
    assert {event.total for event in trials} == {FEASIBLE}
    assert all(isinstance(event.record, Record) for event in trials)
    assert trials[-1].best_us == 100.0
    assert first.best in [event.record for event in events if event.kind == "finalist"]
    assert [event.record for event in events if event.kind == "done"] == [first.best, second.best]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_trials": 0}, "max_trials=0"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0"),
        ({"effort": "hard"}, "unknown effort 'hard'"),
        ({"templates": ["triton/plain"]}, "Did you mean 'triton/plane'"),
    ],
)
def test_wrong_arguments_are_named(
    database: Database, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.InvalidInput, match=message):
        run(database, Workers(), **options)


def test_problems_without_work_are_refused(database: Database) -> None:
    empty = dataclasses.replace(PROBLEM, seqlen_k=0)
    with pytest.raises(errors.InvalidInput, match="no work"):
        run(database, Workers(), empty)
    with pytest.raises(errors.InvalidInput, match="empty"):
        tune([], GPU, database=database, workers=Workers(), catalog=CATALOG)


def test_a_plan_counts_without_touching_anything(database: Database) -> None:
    run(database, Workers(), max_trials=10)
    wide = Problem.parse("b2s1024h8d256c-bfloat16")
    plans = tuner.plan(
        [PROBLEM, wide], GPU, effort="full", catalog=CATALOG, database=database, present=True
    )
    (part,) = plans[0].templates
    assert (part.size, part.feasible, part.stored) == (80, FEASIBLE, 10)
    assert part.rejected["x + y stays small"] == 2
    assert part.compile_s == 0.5
    assert plans[0].trials == FEASIBLE - 10
    assert plans[0].seconds > 0
    assert plans[1].templates == ()
    assert plans[1].refused == {"triton/plane": "head_dim is at most 128"}
    assert (plans[1].trials, plans[1].seconds) == (0, 0.0)


def test_templates_take_turns_with_their_seeds(database: Database) -> None:
    gpu, problem = KNOWN_GPUS["sm90"], Problem.parse("b4s4096h16d128c")
    templates = installed().templates
    run = Run(
        templates=templates,
        device=gpu,
        database=database,
        workers=Workers(),
        effort=EFFORTS["normal"],
        policy="pretended",
        jobs=2,
        seed=0,
    )
    names = ("cuda/fwd_sm80", "cuda/fwd_sm90", "triton/fwd")
    tried = [c.template for c in run.seeds(problem, [templates[name] for name in names])]
    assert tried[:7] == [*names, *names[1:], *names[1:]]  # defaults, then turns; sm80 gives way
    assert set(tried[-3:]) == {"cuda/fwd_sm80"}


@pytest.mark.parametrize(
    ("name", "arch", "each_ms"),
    [("quick", "sm90", 60.0), ("normal", "sm90", 1800.0), ("normal", "cpu", 150.0)],
)
def test_finals_on_a_gpu_last_until_its_power_limit_shows(name, arch, each_ms):
    effort = EFFORTS[name]
    assert effort.finalist_ms(for_arch(arch)) == each_ms
    assert arch == "cpu" or name == "quick" or each_ms / effort.rounds >= 100.0


def test_finals_leave_the_search_half_of_a_short_time():
    normal, gpu = EFFORTS["normal"], for_arch("sm90")
    assert normal.within(None) == normal.within(120.0) == normal
    short = normal.within(17.5)
    finals_s = (short.finalists + 2) * short.finalist_ms(gpu) / 1e3
    assert 0.0 < finals_s <= 17.5 / 2
    assert normal.within(0.0).finalist_ms(gpu) == normal.finals_ms
