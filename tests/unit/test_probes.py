"""On which shapes winners are measured."""

from __future__ import annotations

import pytest

from autoflash.device import KNOWN_GPUS, for_arch
from autoflash.dispatch_table import Family
from autoflash.problem import Problem
from autoflash.tuning.budget import call_s
from autoflash.tuning.probes import is_held_out, probes

GPU = KNOWN_GPUS["sm90"]
WINNERS = [Problem.parse(name) for name in ("b16s1024h16d128c", "b1s16384h16d128c")]


def test_shapes_are_of_the_family_distinct_and_never_a_winners_own() -> None:
    found = probes(WINNERS, GPU, 30)
    assert len(set(found)) == 30
    assert {Family.of(problem) for problem in found} == {Family.of(WINNERS[0])}
    assert not set(found) & set(WINNERS)
    assert found[7] not in probes([*WINNERS, found[7]], GPU, 30)


def test_more_shapes_begin_with_the_same_ones() -> None:
    assert probes(WINNERS, GPU, 40)[:25] == probes(WINNERS, GPU, 25)


def test_another_seed_gives_other_shapes_spread_as_evenly() -> None:
    first, second = probes(WINNERS, GPU, 30), probes(WINNERS, GPU, 30, seed=1)
    assert len(set(first) & set(second)) < 10  # sizes are few, so that some meet again
    assert probes(WINNERS, GPU, 30, seed=1) == second


def test_a_fifth_is_held_out_of_any_beginning() -> None:
    for count in (5, 10, 30):
        assert sum(map(is_held_out, range(count))) == count // 5


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("held_out", [False, True])
def test_shapes_are_spread_over_lengths_heads_and_groups(held_out: bool, seed: int) -> None:
    every = probes(WINNERS, GPU, 60, seed)
    found = [problem for number, problem in enumerate(every) if is_held_out(number) == held_out]
    share = len(found) / 60
    heads = [p.batch * p.num_heads for p in found]
    assert max(heads) >= 16 * min(heads)
    assert max(p.seqlen_k for p in found) >= 16 * min(p.seqlen_k for p in found)
    assert sum(p.seqlen_q == p.seqlen_k for p in found) >= 20 * share
    assert sum(p.seqlen_q <= 32 for p in found) >= 5 * share
    assert sum(p.seqlen_k / p.seqlen_q > 1 and p.seqlen_q > 32 for p in found) >= 5 * share
    assert {p.group_size for p in found} == {1, 4}


@pytest.mark.parametrize("device", [GPU, for_arch("cpu")])
def test_no_shape_takes_long(device: object) -> None:
    assert isinstance(device, type(GPU))
    for problem in probes([Problem.parse("b1s64h8d128f-float32")], device, 40):
        assert call_s(problem, device) <= 30e-3
        assert problem.flops > 0
        assert problem.bytes <= 2 << 30


def test_windows_caps_and_groups_are_those_of_the_winners() -> None:
    like = [Problem.parse("b1s4096h40/8d64cw511cap50"), Problem.parse("b1s4096h40/8d64cw127cap50")]
    found = probes(like, GPU, 30)
    assert {Family.of(problem) for problem in found} == {Family.of(like[0])}
    assert {p.window_left for p in found} >= {127, 511}
    assert {p.softcap for p in found} == {50.0}
    assert {p.group_size for p in found} == {1, 4, 5}
