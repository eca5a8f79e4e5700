from __future__ import annotations

import json
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
    window_left=st.none() | st.integers(0, 1 << 17),
    window_right=st.none() | st.integers(0, 1 << 17),
    softcap=st.just(0.0) | st.sampled_from([20.0, 30.0, 50.0]) | st.floats(0.0, 1e30),
    aligned=st.booleans(),
)


@given(problems)
def test_name_and_dict_are_read_back_exactly(problem: Problem) -> None:
    assert Problem.parse(problem.name) == problem
    assert Problem.from_dict(problem.to_dict()) == problem
    assert Problem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem


def test_fields_that_a_record_of_before_lacks_have_their_defaults() -> None:
    problem = Problem.parse("b1s128h4d64c")
    fields = problem.to_dict()
    for name in ("window_left", "window_right", "softcap"):
        del fields[name]
    assert Problem.from_dict(fields) == problem


small = st.builds(
    Problem,
    batch=st.just(1),
    num_heads=st.just(1),
    num_kv_heads=st.just(1),
    head_dim=st.just(8),
    seqlen_q=st.integers(0, 12),
    seqlen_k=st.integers(0, 12),
    causal=st.booleans(),
    window_left=st.none() | st.integers(0, 14),
    window_right=st.none() | st.integers(0, 14),
)


def seen(p: Problem) -> list[list[bool]]:
    """The mask by its definition, pair by pair."""
    right = 0 if p.causal else p.window_right
    places = range(p.seqlen_k - p.seqlen_q, p.seqlen_k)
    return [
        [
            (p.window_left is None or key >= place - p.window_left)
            and (right is None or key <= place + right)
            for key in range(p.seqlen_k)
        ]
        for place in places
    ]


@given(small)
def test_pairs_of_a_window_are_those_that_the_mask_lets_through(problem: Problem) -> None:
    counted = sum(map(sum, seen(problem)))
    if problem.local:
        assert problem.pairs == counted
    elif problem.causal:  # half, as the field counts
        rows = min(problem.seqlen_q, problem.seqlen_k)
        assert problem.pairs == counted - rows / 2
    else:
        assert problem.pairs == counted
    assert problem.flops == 2 * problem.pairs * 16


@given(
    seqlen_q=st.integers(0, 9),
    seqlen_k=st.integers(0, 9),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 10),
    right=st.none() | st.integers(0, 10),
)
def test_a_window_becomes_what_it_hides(
    seqlen_q: int, seqlen_k: int, causal: bool, left: int | None, right: int | None
) -> None:
    problem = Problem(
        batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=1, num_kv_heads=1, head_dim=8,
        causal=causal, window_left=left, window_right=right,
    )  # fmt: skip
    place = seqlen_k - seqlen_q
    asked = [
        [
            (left is None or key >= row + place - left)
            and (right is None or key <= row + place + right)
            and (not causal or key <= row + place)
            for key in range(seqlen_k)
        ]
        for row in range(seqlen_q)
    ]
    assert seen(problem) == asked
    assert not (problem.causal and problem.window_right is not None)
    if seqlen_k > 1 and problem.window_left is not None:  # it would not be there in vain
        assert problem.window_left < seqlen_k - 1


def test_equal_masks_are_equal_problems() -> None:
    causal, full = Problem.parse("b1s64h1d8c"), Problem.parse("b1s64h1d8f")
    assert Problem.parse("b1s64h1d8fwinfx0") == causal
    assert Problem.parse("b1s64h1d8cw63") == causal
    assert Problem.parse("b1s64h1d8cw5x9") == Problem.parse("b1s64h1d8fw5x0")
    assert Problem.parse("b1s64h1d8fw63x63") == full
    assert Problem.parse("b1s64h1d8fw62x63").window_left == 62
    assert not full.local
    assert Problem.parse("b1s64h1d8fcap0") == full


@pytest.mark.parametrize(
    ("name", "local", "softcapped"),
    [
        ("b4s4096h32/8d128cw1023cap50-bfloat16", True, True),
        ("b4s4096h32/8d128fw512x128-float16", True, False),
        ("b4s4096h32/8d128fwinfx128-bfloat16-unaligned", True, False),
        ("b4s4096h32/8d128ccap0.1234567-bfloat16", False, True),
        ("b4s4096h32/8d128fcap1e-05-bfloat16", False, True),
    ],
)
def test_names_of_windows_and_caps(name: str, local: bool, softcapped: bool) -> None:
    problem = Problem.parse(name)
    assert problem.name == name
    assert (problem.local, problem.softcapped) == (local, softcapped)
    assert problem.traits["local"] is local
    assert problem.traits["softcapped"] is softcapped


def test_eight_bits_have_an_op_of_their_own_and_16_bits_of_output() -> None:
    problem = Problem.parse("b1s64h1d128c-float8_e4m3fn")
    assert problem.op == "fwd_fp8"
    assert problem.out_dtype == "bfloat16"
    assert problem.bytes == 64 * 128 * 3 + 64 * 128 * 2 + 64 * 4
    assert Problem.parse("b1s64h1d128c-float16").out_dtype == "float16"


@given(problems, problems)
def test_distance_is_symmetric_and_zero_only_for_like_work(one: Problem, two: Problem) -> None:
    assert one.distance(one) == 0
    assert one.distance(two) == pytest.approx(two.distance(one))
    assert one.distance(two) >= 0


def test_distance_is_infinite_across_what_a_kernel_is_compiled_for() -> None:
    base = Problem.parse("b1s1024h8d64f")
    for other in (
        "b1s1024h8d128f",
        "b1s1024h8d64c",
        "b1s1024h8d64f-float32",
        "b1s1024h8d64x32f",
        "b1s1024h8d64fw9x9",
        "b1s1024h8d64fcap5",
        "b1s1024h8d64f-float8_e4m3fn",
    ):
        assert base.distance(Problem.parse(other)) == math.inf
    assert 0 < base.distance(Problem.parse("b1s2048h8d64f")) < math.inf
    assert base.distance(Problem.parse("b1s1024h8d64f-float16")) == 1
    local = Problem.parse("b1s1024h8d64cw127")
    assert local.distance(Problem.parse("b1s1024h8d64cw255")) == 1
    assert local.distance(Problem.parse("b1s2048h8d64cw127")) == 2
    capped = Problem.parse("b1s1024h8d64ccap50")
    assert capped.distance(Problem.parse("b1s1024h8d64ccap30")) == 0


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
        ({"window_left": -1}, InvalidInput, "window_left=-1"),
        ({"window_right": 1.5}, InvalidInput, "window_right=1.5"),
        ({"softcap": -1.0}, InvalidInput, "softcap=-1.0"),
        ({"softcap": math.inf}, InvalidInput, "softcap=inf"),
        ({"softcap": None}, InvalidInput, "softcap=None"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    fields = Problem.parse("b1s128h4d64f").to_dict() | change
    with pytest.raises(error, match=words):
        Problem.from_dict(fields)


@pytest.mark.parametrize(
    "text",
    ["", "b1", "b1s2h3d4", "b1s2h3d4x", "1,2,3", "b1s2h3d4c-", "b1s2h3d4cw", "b1s2h3d4cw-1",
     "b1s2h3d4cap5w3", "b1s2h3d4ccap", "b1s2h3d4ccapinf"],
)  # fmt: skip
def test_a_name_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidInput, match="such as b4s4096h32/8d128c"):
        Problem.parse(text)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(UnknownName, match="problem field 'window'"):
        Problem.from_dict({**Problem.parse("b1s2h3d4c").to_dict(), "window": 3})
