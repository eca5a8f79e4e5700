"""Which leaves are chosen: the known optimum, and what holds for any measurements."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dispatch_tables import probe, table

from autoflash.dispatch_table import DispatchTable, Leaf, Probe
from autoflash.problem import Problem
from autoflash.tuning.partition import GAIN, SLACK, partition

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def chosen(leaves: Sequence[Leaf]) -> list[tuple[str, int | None]]:
    return [(str(leaf), leaf.config) for leaf in leaves]


def served(leaves: Sequence[Leaf], each: Probe) -> float:
    (leaf,) = [leaf for leaf in leaves if leaf.holds(each.problem)]
    time = each.default_us if leaf.config is None else each.times_us[leaf.config]
    assert time is not None
    return time


def test_two_regimes_are_told_apart_half_way_between_them() -> None:
    probes = [probe(n, 100.0, 80.0 if n >= 2048 else 130.0) for n in LENGTHS]
    leaves = partition(probes)
    # Lengths of equal problems divide alike: the first feature in order says where, and keys too
    # are as many as at the probes.
    assert chosen(leaves) == [
        ("tiles <= 90", None), ("tiles > 90 and seqlen_k > 1448", 1),
    ]  # fmt: skip
    assert [leaf.probes for leaf in leaves] == [4, 4]
    assert [leaf.worst for leaf in leaves] == [0.0, 0.0]


def test_a_band_between_two_bounds_is_found() -> None:
    # Neither bound alone gains anything: a search that takes the best first split is lost.
    probes = [probe(n, 100.0, 80.0 if 512 <= n <= 2048 else 130.0) for n in LENGTHS]
    assert chosen(partition(probes)) == [
        ("tiles <= 22", None), ("22 < tiles <= 181 and 362 < seqlen_k <= 2896", 1),
        ("tiles > 181", None),
    ]  # fmt: skip


def test_the_feature_that_decides_is_found() -> None:
    names = [f"b1s{q}x{k}h8d64c" for q in (128, 1024) for k in (1024, 2048, 8192, 16384)]
    probes = [probe(n, 100.0, 70.0 if "x8192" in n or "x16384" in n else 120.0) for n in names]
    assert chosen(partition(probes)) == [("seqlen_k <= 4096", None), ("seqlen_k > 4096", 1)]


def test_the_worst_regret_counts_before_the_mean() -> None:
    # With one leaf: config 1 is 2 % off everywhere, config 2 best but for one shape.
    rows = [(150.0, 102.0, 100.0)] * 7 + [(150.0, 102.0, 140.0)]
    probes = [probe(n, *times) for n, times in zip(LENGTHS, rows, strict=True)]
    (leaf,) = partition(probes, most_leaves=1)
    assert leaf.config == 1
    assert leaf.worst == pytest.approx(0.02)


def test_a_leaf_worse_than_the_default_somewhere_is_the_default() -> None:
    probes = [probe(n, 100.0, 90.0) for n in LENGTHS[:-1]]
    assert chosen(partition([*probes, probe(LENGTHS[-1], 100.0, 90.0)])) == [("every shape", 1)]
    once_slower = [*probes, probe(LENGTHS[-1], 100.0, 100.0 * (1 + SLACK) + 0.1)]
    (leaf,) = partition(once_slower, most_leaves=1)
    assert leaf.config is None


def test_what_beats_the_default_by_less_than_the_noise_does_not_replace_it() -> None:
    probes = [probe(n, 100.0, 100.0 * (1 - GAIN / 2)) for n in LENGTHS]
    assert chosen(partition(probes)) == [("every shape", None)]


def test_a_config_that_cannot_serve_a_shape_serves_no_leaf_with_it() -> None:
    probes = [probe(n, 100.0, None if n == 128 else 50.0) for n in LENGTHS]
    (one,) = partition(probes, most_leaves=1)
    assert one.config is None
    assert chosen(partition(probes)) == [
        ("tiles <= 22", None), ("tiles > 22 and seqlen_k > 362", 1),
    ]  # fmt: skip


def test_a_config_serves_no_further_than_it_was_compared() -> None:
    # Twice as fast for long keys with many tiles: with few, where the default shares keys out,
    # nobody compared the two.
    names = [f"b{b}s1024x{k}h8d64c" for b in (4, 8) for k in (512, 1024, 8192, 16384)]
    few = [f"b1s128x{k}h8d64c" for k in (512, 1024)]
    probes = [probe(n, 100.0, 50.0 if "x8192" in n or "x16384" in n else 130.0) for n in names]
    leaves = partition([*probes, *(probe(n, 100.0, 130.0) for n in few)])
    assert chosen(leaves) == [
        ("seqlen_k <= 2896", None), ("seqlen_k > 2896 and tiles > 45", 1),
    ]  # fmt: skip
    assert not any(leaf.holds(Problem.parse("b1s128x8192h8d64c")) for leaf in leaves)


def test_shapes_held_out_change_nothing() -> None:
    probes = [probe(n, 100.0, 80.0 if n >= 2048 else 130.0) for n in LENGTHS]
    aside = [probe(n + 64, 100.0, 1.0, held_out=True) for n in LENGTHS]
    assert partition([*probes, *aside]) == partition(probes)


def test_without_probes_everything_is_the_default() -> None:
    assert chosen(partition([])) == [("every shape", None)]


# Any measurements -------------------------------------------------------------------------------

TIMES = st.one_of(st.none(), st.floats(50.0, 200.0))


@st.composite
def measured(draw: st.DrawFn) -> list[Probe]:
    count, configs = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    probes = []
    for _ in range(count):
        name = (
            f"b{draw(st.sampled_from([1, 2, 8]))}s{draw(st.sampled_from([1, 100, 1000, 5000]))}"
            f"x{draw(st.sampled_from([128, 1000, 8000]))}h8/{draw(st.sampled_from([2, 8]))}d64c"
        )
        times = [draw(st.floats(50.0, 200.0)), *(draw(TIMES) for _ in range(configs))]
        probes.append(probe(name, *times, held_out=draw(st.booleans())))
    return probes


@settings(max_examples=60, deadline=None)
@given(measured(), st.randoms(use_true_random=False))
def test_of_any_measurements(probes: list[Probe], shuffler: random.Random) -> None:
    leaves = partition(probes)
    seen = [each for each in probes if not each.held_out]
    assert 1 <= len(leaves) <= 4
    for each in probes:  # what was compared has one leaf; beyond that there may be none
        found = sum(leaf.holds(each.problem) for leaf in leaves)
        assert found == 1 or (found == 0 and each.held_out)
    worst = {
        strategy: max((time / p.best_us for time, p in times), default=1.0)
        for strategy, times in {
            "table": [(served(leaves, p), p) for p in seen],
            "default": [(p.default_us, p) for p in seen],
        }.items()
    }
    assert worst["table"] <= worst["default"] * (1 + GAIN) + 1e-9
    for leaf in leaves:
        inside = [each for each in seen if leaf.holds(each.problem)]
        assert len(inside) == leaf.probes
        if leaf.config is None:
            continue
        ratios = [served(leaves, each) / each.default_us for each in inside]
        assert all(ratio <= 1 + SLACK + 1e-9 for ratio in ratios)
        assert math.prod(ratios) ** (1 / len(ratios)) <= 1 / (1 + GAIN) + 1e-9
    assert partition(probes) == leaves
    shuffler.shuffle(probes)
    again = partition(probes)
    merit = [(round(leaf.worst, 6), leaf.probes) for leaf in leaves]
    assert max(merit)[0] == max((round(leaf.worst, 6), leaf.probes) for leaf in again)[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(50.0, 200.0), min_size=3, max_size=3), min_size=4, max_size=8))
def test_no_tree_of_two_leaves_is_better(rows: list[list[float]]) -> None:
    probes = [probe(n, *times) for n, times in zip(LENGTHS, rows, strict=False)]
    leaves = partition(probes, most_leaves=2)
    found = max(served(leaves, each) / each.best_us for each in probes)

    def best_of(side: Sequence[Probe]) -> float:
        """By hand: the least worst regret of the default or a config that may replace it."""
        options = [max(p.default_us / p.best_us for p in side)]
        for config in range(3):
            ratios = [p.times_us[config] / p.default_us for p in side]
            log = sum(map(math.log, ratios)) / len(ratios)
            if max(ratios) <= 1 + SLACK and log <= -math.log1p(GAIN):
                options.append(max(p.times_us[config] / p.best_us for p in side))
        return min(options)

    splits = [(probes[:n], probes[n:]) for n in range(2, len(probes) - 1)]
    ideal = min([best_of(probes), *(max(map(best_of, two)) for two in splits)])
    assert found <= ideal * (1 + 2 * GAIN) + 1e-9


def test_regret_of_a_chosen_table_is_what_its_leaves_say() -> None:
    probes = tuple(
        dataclasses.replace(p, held_out=n % 5 == 4)
        for n, p in enumerate(probe(128 * n, 100.0 + n, 130.0 - 3 * n) for n in range(1, 21))
    )
    made: DispatchTable = table(probes=probes, leaves=partition(probes))
    assert made.regret("table", held_out=False).worst == pytest.approx(
        max(leaf.worst for leaf in made.leaves)
    )
    for held_out in (False, True):
        ours, theirs = (made.regret(s, held_out=held_out) for s in ("table", "default"))
        assert ours.mean < theirs.mean


def test_the_script_leaves_each_shape_out_in_turn(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = [sys.executable, str(root / "benchmarks" / "leave_one_out.py")]
    dump = root / "benchmarks" / "nvidia-h200" / "dispatch-tables.jsonl"
    (line,) = (each for each in dump.read_text().splitlines() if '"head_dim":64' in each
               and '"causal":false' in each)  # fmt: skip
    (tmp_path / "one.jsonl").write_text(line)  # the others take some ten seconds each
    there: dict[str, Any] = {
        "capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(root)}
    }  # fmt: skip
    ran = subprocess.run([*script, str(tmp_path / "one.jsonl")], check=True, **there)
    assert [row.split() for row in ran.stdout.splitlines()] == [
        ["family", "table", "nearest", "default"],
        ["fwd-d64f-bfloat16", *("0.0%", "0.5%") * 3],  # one config is best everywhere
    ]
    assert subprocess.run(script, check=False, **there).returncode == 2
