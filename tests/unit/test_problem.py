from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoflash.errors import InvalidInput, UnknownName
from autoflash.problem import ELEMENT_SIZES, Problem

problems = st.builds(
    lambda kv, group, **rest: Problem(num_heads=kv * group, num_kv_heads=kv, **rest),
    kv=st.integers(1, 16),
    group=st.integers(1, 8),
    dtype=st.sampled_from(sorted(ELEMENT_SIZES)),
    batch=st.integers(0, 64),
    seqlen_q=st.integers(0, 1 << 17),
    seqlen_k=st.integers(0, 1 << 17),
    head_dim=st.integers(1, 512),
    head_dim_v=st.integers(0, 512),
    causal=st.booleans(),
    aligned=st.booleans(),
)


@given(problems)
def test_name_and_dict_are_read_back_exactly(problem: Problem) -> None:
    assert Problem.parse(problem.name) == problem
    assert Problem.from_dict(problem.to_dict()) == problem


@given(problems, problems)
def test_distance_is_symmetric_and_zero_only_for_like_work(one: Problem, two: Problem) -> None:
    assert one.distance(one) == 0
    assert one.distance(two) == pytest.approx(two.distance(one))
    assert one.distance(two) >= 0


def test_distance_is_infinite_across_what_a_kernel_is_compiled_for() -> None:
    base = Problem.parse("b1s1024h8d64f")
    for other in ("b1s1024h8d128f", "b1s1024h8d64c", "b1s1024h8d64f-float32", "b1s1024h8d64x32f"):
        assert base.distance(Problem.parse(other)) == math.inf
    assert 0 < base.distance(Problem.parse("b1s2048h8d64f")) < math.inf
    assert base.distance(Problem.parse("b1s1024h8d64f-float16")) == 1


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("b1s1024h1d64f", 1024 * 1024),
        ("b1s1024h1d64c", 1024 * 1024 / 2),
        # Every query row but the last few sees most keys: 16 rows of 1016 keys on average.
        ("b1s16x1024h1d64c", 16 * (1008 + 1024) / 2),
        # Only the last 16 rows see anything.
        ("b1s1024x16h1d64c", 16 * 16 / 2),
        ("b1s5x0h1d64c", 0),
    ],
)
def test_pairs_by_the_count_of_the_field(name: str, pairs: float) -> None:
    assert Problem.parse(name).pairs == pairs


def test_flops_and_bytes_of_unequal_head_dims() -> None:
    problem = Problem.parse("b2s128x256h4/2d192x128f-bfloat16")
    assert problem.flops == 2 * 2 * 4 * 128 * 256 * (192 + 128)
    rows_q, rows_k = 2 * 4 * 128, 2 * 2 * 256
    assert problem.bytes == 2 * 320 * (rows_q + rows_k) + 4 * rows_q
    assert problem.tflops(problem.flops / 1e6) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, InvalidInput, "num_heads=6 is not a multiple of"),
        ({"seqlen_k": -1}, InvalidInput, "seqlen_k=-1"),
        ({"head_dim": 0}, InvalidInput, "head_dim=0"),
        ({"dtype": "bf16"}, UnknownName, "Did you mean 'bfloat16'"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    fields = Problem.parse("b1s128h4d64f").to_dict() | change
    with pytest.raises(error, match=words):
        Problem.from_dict(fields)


@pytest.mark.parametrize("text", ["", "b1", "b1s2h3d4", "b1s2h3d4x", "1,2,3", "b1s2h3d4c-"])
def test_a_name_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidInput, match="such as b4s4096h32/8d128c"):
        Problem.parse(text)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(UnknownName, match="problem field 'window'"):
        Problem.from_dict({**Problem.parse("b1s2h3d4c").to_dict(), "window": 3})
