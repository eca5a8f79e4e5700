"""Replays: the tuner's loop in simulated time, and what the comparison of searches says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
from support.tables import PROBLEM, header, point, row, table

from autoflash import cli
from autoflash.cli.simulation import strategy_names
from autoflash.errors import ToolchainMissing
from autoflash.problem import Problem
from autoflash.tuning.replay import Step, Trace, replay
from autoflash.tuning.simulate import Spread, serial_sweep_s, simulate, sweep_s
from autoflash.tuning.strategy import STRATEGIES
from autoflash.tuning.table import Table, read_all

TABLES = Path(__file__).parents[1] / "replay"

# The clock --------------------------------------------------------------------------------------


def test_compilers_work_at_once_and_beside_the_device() -> None:
    rows = [row(point(7, 16)), row(point(1, 1)), row(point(1, 2))]
    (trace,) = replay([Table(header(jobs=2), rows)], "sweep")
    # Two compile for 1 s, then one runs for 0.38 s: load, check, rungs. The third is there at 2 s.
    assert [round(step.seconds, 2) for step in trace.steps] == [1.38, 1.76, 2.38]
    (trace,) = replay([Table(header(jobs=1), rows)], "sweep")
    assert [round(step.seconds, 2) for step in trace.steps] == [1.38, 2.38, 3.38]


def test_racing_costs_only_the_rungs_that_were_run() -> None:
    rows = [row(point(7, 16), 100.0), row(point(1, 1), 140.0), row(point(1, 2), 400.0)]
    alone = Table(header(jobs=3), rows)
    (raced,) = replay([alone], "seeded-random")
    ends = [step.seconds for step in raced.steps]
    between = [round(b - a, 2) for a, b in itertools.pairwise(ends)]
    # 1.4 times as slow falls at the second rung, 4 times at the first: the order is the seed's.
    assert sorted(between) == [0.31, 0.33]
    assert raced.outcomes == {"ok": 1, "slow": 2}
    (unraced,) = replay([alone], "sweep")
    assert unraced.outcomes == {"ok": 3}


def test_a_rung_that_was_not_recorded_takes_the_time_of_its_calls() -> None:
    known = row(point(7, 16), 1000.0)
    short = dataclasses.replace(known, rungs=known.rungs[:1])
    (trace,) = replay([Table(header(), [short])], "sweep")
    # 12.5 ms and 50 ms of calls of a millisecond, and 2 ms around each.
    assert trace.steps[0].seconds == pytest.approx(1.31 + 0.012 + 0.05 + 0.004)


def test_a_recorded_crash_is_tried_again_as_the_tuner_does() -> None:
    rows = [row(point(7, 16)), row(point(1, 1), None, "crash"), row(point(1, 2))]
    (trace,) = replay([Table(header(jobs=3), rows)], "sweep")
    assert trace.outcomes == {"ok": 2, "crash": 1}
    # Its load and check, 0.3 s, come twice: one more process is spent on it.
    assert trace.steps[-1].seconds == pytest.approx(1.0 + 2 * 0.38 + 2 * 0.3)


def test_configs_of_one_source_are_compiled_and_run_once() -> None:
    rows = [row(point(7, 16), source="same"), row(point(1, 1), source="same")]
    (trace,) = replay([Table(header(jobs=1), rows)], "sweep")
    assert [round(step.seconds, 2) for step in trace.steps] == [1.38, 1.38]


def test_failures_cost_what_they_cost_and_are_never_the_best() -> None:
    broken = dataclasses.replace(row(point(1, 1), None, "compile_error"), load_s=None, check_s=None)
    rows = [row(point(7, 16), 300.0), broken, row(point(1, 2), None, "wrong_result")]
    (trace,) = replay([Table(header(jobs=3), rows)], "sweep")
    assert trace.outcomes == {"ok": 1, "compile_error": 1, "wrong_result": 1}
    assert trace.regret() == 0.0
    assert max(step.seconds for step in trace.steps) == pytest.approx(1.0 + 0.38 + 0.3)


def test_problems_of_one_run_share_kernels_and_winners() -> None:
    other = Problem.parse("b2s2048h8d64c-bfloat16")
    first, second = table(), table(problem=other)
    alone = replay([second], "default", seed=3, trials=20)[0]
    after = replay([first, second], "default", seed=3, trials=20)[1]
    winner = min(
        replay([first], "default", seed=3, trials=20)[0].steps,
        key=lambda step: step.latency_us or math.inf,
    ).config
    assert [step.config for step in after.steps[:2]] == [point(7, 16), winner]
    assert after.steps[1].seconds < 1.0 < alone.steps[0].seconds  # compiled before


def test_time_and_trials_bound_a_replay() -> None:
    (trace,) = replay([table()], "default", trials=12)
    assert len(trace.steps) == 12
    (trace,) = replay([table(jobs=1)], "default", seconds=10.0)
    assert 5 <= len(trace.steps) <= 10
    (trace,) = replay([table()], "sweep")
    assert len(trace.steps) == 80


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_replays_and_repeats_itself(strategy: str) -> None:
    if (missing := STRATEGIES[strategy].unavailable) is not None:
        pytest.skip(missing)
    once, again = (replay([table()], strategy, seed=5, trials=15)[0] for _ in range(2))
    assert once.steps == again.steps
    assert len({step.config for step in once.steps}) == 15


# What is made of it -----------------------------------------------------------------------------


def test_regret_counts_the_best_so_far() -> None:
    made = table()
    steps = (
        Step(1.0, point(7, 16), 400.0),
        Step(2.0, point(1, 1), None),
        Step(4.0, point(2, 4, True), 100.0),
    )
    trace = Trace(made, "made up", 0, steps)
    assert trace.regret(trials=2) == pytest.approx(3.0)
    assert trace.regret(seconds=3.9) == pytest.approx(3.0)
    assert trace.regret(seconds=4.0) == 0.0
    assert trace.regret(seconds=0.5) == math.inf
    assert trace.reached(0.01) == (3, 4.0)
    assert Trace(made, "made up", 0, steps[:2]).reached(0.01) == (math.inf, math.inf)


def test_the_sweep_compiles_at_once_and_times_by_do_bench() -> None:
    benched = dataclasses.replace(row(point(7, 16), source="a"), do_bench=(100.0, 0.2))
    rows = [benched, row(point(1, 1), source="b"), row(point(1, 2), source="b")]
    failed = row(point(1, 4), None, "compile_error", source="c")
    made = Table(header(jobs=2), [*rows, failed])
    # Two kernels at 1 s, each 0.2 s on the device; the one that fails is compiled in vain.
    assert sweep_s(made) == pytest.approx(2.0)
    assert sweep_s(made, jobs=3) == pytest.approx(1.4)
    assert serial_sweep_s(made) == pytest.approx(3.4)


def test_a_comparison_takes_median_and_worst() -> None:
    assert Spread.of([1.0, math.inf, 2.0]) == Spread(2.0, math.inf)
    found = {one.strategy: one for one in simulate([table()], ["default", "sweep"], seeds=3)}
    assert found["default"].replays == 3
    assert found["sweep"].replays == 1  # it does not depend on the seed
    # The model finds the bottom of a bowl of 80 configs in a third of them; the declared order,
    # by which it is the 26th, cannot be faster than its place.
    assert found["sweep"].trials_to_near.worst == 26
    assert found["default"].trials_to_near.worst < 26
    assert found["default"].by_trials[80].worst == 0.0


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(TABLES.glob("b4s4096h16-16d128f*.jsonl"))
    words = ["simulate", str(path), "--strategies", "default,random", "--seeds", "2"]
    cli.app([*words, "--trials", "20", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [one["strategy"] for one in found["strategies"]] == ["default", "random"]
    assert found["tables"][0]["problem"] == "b4s4096h16/16d128f-bfloat16"
    assert found["strategies"][0]["replays"] == 2
    assert set(found["strategies"][0]["regret_by_trials"]["10"]) == {"median", "worst"}
    cli.app([*words, "--trials", "20"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "default: as `tune` searches" in said
    with pytest.raises(SystemExit) as exited:
        cli.main(["simulate", str(path), "--strategies", "defualt"])
    assert exited.value.code == 2
    assert "strategy 'defualt'" in capsys.readouterr().err


def test_a_strategy_that_lacks_a_library_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoflash.tuning.strategy.find_spec", lambda name: None)
    assert "seeded-gp" not in strategy_names(None)
    assert strategy_names("random,default") == ["random", "default"]
    with pytest.raises(ToolchainMissing, match="pip install scipy"):
        strategy_names("seeded-gp")


# The shipped search, on what was recorded --------------------------------------------------------

MARGIN = 0.5
"""The shipped search's mean regret is at most this share of that of random proposals."""
SEEDS = 8


@pytest.mark.parametrize("trials", [10, 20, 40])
def test_the_shipped_search_beats_chance(trials: int) -> None:
    tables = read_all([TABLES])
    mean = {}
    for name in ("default", "random"):
        # Two compilers at a time: with more, more is proposed before anything is known.
        traces = [
            trace
            for one in tables
            for seed in range(SEEDS)
            for trace in replay([one], name, seed=seed, trials=trials, jobs=2)
        ]
        mean[name] = statistics.mean(trace.regret() for trace in traces)
    assert mean["default"] <= MARGIN * mean["random"], mean


def test_recorded_tables_are_of_known_problems() -> None:
    tables = read_all([TABLES])
    assert PROBLEM.name not in {one.name for one in tables}
    for one in tables:
        assert len(one.rows) >= 40, one.name
        assert all(space.default in one.rows for space in one.header.spaces.values()), one.name


def test_searches_are_compared_only_up_to_the_trials_they_had() -> None:
    tables = [table()]
    for trials, counts in ((8, [5, 8]), (20, [5, 10, 20]), (None, [5, 10, 20, 40, 80])):
        (found,) = simulate(tables, ["random"], seeds=1, trials=trials)
        assert list(found.by_trials) == counts
