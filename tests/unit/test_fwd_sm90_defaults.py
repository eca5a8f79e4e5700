"""What `cuda/fwd_sm90` serves without records, by sizes."""

from __future__ import annotations

import itertools

import pytest

from autoflash.codegen.catalog import installed
from autoflash.codegen.defaults import defaults
from autoflash.device import KNOWN_GPUS
from autoflash.problem import Problem

TEMPLATE = installed().get("cuda/fwd_sm90")
H200 = KNOWN_GPUS["sm90"]


# Each was timed with two and with three (benchmarks/nvidia-h200/drawing.csv), or is level.
@pytest.mark.parametrize(
    ("names", "consumers"),
    [
        # Tiles alike: as many rounds as possible save a third of the rows of each.
        ("b1s2048h8d128f b1s4096h8d128f b2s2048h16d128f b3s1536h24/6d128f b16s1024h16d96f", 2),
        ("b1s4096h12d128f b1s768h32/8d128f b1s1536x24576h16/4d128c b4s4096h16d128f", 3),
        ("b1s2048h8d64f b1s1024h32d64f b2s640h24d64f b1s4096h8d96f", 2),
        ("b2s2048h16d64f b16s1024h32d64f b1s4096h12d96f b1s768h32/8d96f", 3),
        # Causal: the longest tile must not outlast a share of all.
        ("b1s4096h8d128c b1s2048h16d128c b4s4096h16d128c b1s768h32/8d64c b16s1024h32d64c", 2),
        ("b1s6144h8d128c b1s16384h32/8d128c b1s6144h8d64c b4s4096h32d64c b3s3000h24/6d96c", 3),
        # Few rows have one; what is shared out, and wide heads, two.
        ("b1s64h8d128f b4s16x4096h8d64c", 1),
        ("b1s256x131072h8/1d128c b4s4096h8d256f b4s4096h8d192c", 2),
    ],
)
def test_rounds_decide_how_many_rows_a_tile_has(names: str, consumers: int) -> None:
    chosen = {
        name: TEMPLATE.default_config(Problem.parse(name), H200)["num_consumer_warpgroups"]
        for name in names.split()
    }
    assert chosen == dict.fromkeys(names.split(), consumers)


# Timed beside each other: benchmarks/nvidia-h200/few-rows.csv, dispatch-tables-seed1.jsonl.
@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("b8s2x8192h32/8d128c b1s16x1024h8/2d64f b4s1x8192h16/2d256c", "triton/fwd"),  # shared keys
        ("b4s1x4096h32d128f b4s4x4096h32d64f b2s16x2048h32d128f b1s8x2048h32d128f", TEMPLATE.name),
        ("b16s2x2048h32d128f b1s4x4096h32d64f b1s1x16384h32d128f", "triton/fwd"),
        ("b1s32x4096h32d64f b8s32x128h32/8d128c", TEMPLATE.name),
    ],
)
def test_few_rows_are_left_to_who_is_faster(names: str, first: str) -> None:
    every = installed().templates.values()
    found = {n: defaults(every, Problem.parse(n), H200)[0].template for n in names.split()}
    assert found == dict.fromkeys(names.split(), first)


def test_the_default_is_feasible_whatever_the_sizes() -> None:
    sizes = itertools.product((1, 4), (65, 700, 1100, 7000), (2, 64), (64, 96, 128, 192, 256), "cf")
    for batch, rows, heads, dim, mask in sizes:
        problem = Problem.parse(f"b{batch}s{rows}h{heads}d{dim}{mask}")
        config = TEMPLATE.default_config(problem, H200)
        assert TEMPLATE.broken(config, problem, H200) is None, problem.name
