"""What a dispatch table says of a shape, and how its regret is counted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from support.dispatch_tables import FAST, SLOW, probe, table

from autoflash.dispatch_table import (
    FEATURES,
    REACH,
    Bound,
    DispatchTable,
    Family,
    Leaf,
    Regret,
    by_family,
)
from autoflash.errors import UnknownName
from autoflash.problem import Problem


def parse(name: str) -> Problem:
    return Problem.parse(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("b1s4h8d64c", "fwd-d64c-bfloat16"),
        ("b1s400h8d64x32fw8x8cap30-float16", "fwd-d64x32fwcap-float16"),
        ("b9s4000x70h8/2d64fw8x8-float8_e4m3fn", "fwd_fp8-d64fw-float8_e4m3fn"),
        ("b1s4h8d64c-float32-unaligned", "fwd-d64c-float32-unaligned"),
    ],
)
def test_a_family_is_named_by_what_its_problems_share(name: str, expected: str) -> None:
    assert Family.of(parse(name)).name == expected


def test_every_leaf_is_found_on_its_side_of_the_bound() -> None:
    made = table()
    assert made.leaf(parse("b1s1024h8d64c")) is made.leaves[0]
    assert made.leaf(parse("b1s1025h8d64c")) is made.leaves[1]
    assert made.config_of(made.leaves[0]) is None
    assert made.config_of(made.leaves[1]) == FAST


def test_a_table_is_silent_about_what_is_unlike_its_probes() -> None:
    made = table()
    far = parse("b1s1h8d64c")
    nearest = min(far.distance(p.problem) for p in made.probes if not p.held_out)
    assert nearest > REACH
    assert made.leaf(far) is None
    # A probe held out does not make it speak, or it would be judged on what it answers for.
    aside = dataclasses.replace(made, probes=(*made.probes, probe(1, 5.0, 5.0, held_out=True)))
    assert aside.leaf(far) is None
    known = dataclasses.replace(made, probes=(*made.probes, probe(1, 5.0, 5.0)))
    assert known.leaf(far) is made.leaves[0]
    assert made.leaf(parse("b1s2048h8d64f")) is None
    assert made.leaf(parse("b1s2048h8d64c-float16")) is None


def test_features_count_what_a_launch_is_made_of() -> None:
    problem = parse("b3s300x700h8/2d64c")
    counted = {name: count(problem) for name, count in FEATURES.items()}
    assert counted == {
        "tiles": 3 * 8 * 3, "seqlen_k": 700, "seqlen_q": 300, "heads": 24, "group_size": 4,
    }  # fmt: skip


def test_bounds_read_as_one_writes_them() -> None:
    assert str(Bound("tiles", None, 5)) == "tiles <= 5"
    assert str(Bound("tiles", 5, None)) == "tiles > 5"
    assert str(Bound("tiles", 5, 9)) == "5 < tiles <= 9"
    leaf = Leaf(where=(), config=None, probes=0, mean=0.0, worst=0.0)
    assert str(leaf) == "every shape"


def test_regret_is_against_the_best_measured_at_each_shape() -> None:
    made = table()
    seen = {name: made.regret(name, held_out=False) for name in ("table", "nearest", "default")}
    assert seen["table"] == Regret(4, 0.0, 0.0, "b1s8192h8/8d64c-bfloat16")
    assert seen["default"].worst == pytest.approx(0.125)  # 90 us where 80 are possible
    assert seen["default"].mean == pytest.approx((1.125 * 1.1) ** 0.25 - 1)
    # The nearest winner of 256 rows is that of 512; 1024 and 2048 have two neighbours each.
    assert seen["nearest"].worst == 0.0
    held = made.regret("table", held_out=True)
    assert (held.shapes, held.mean, held.worst) == (2, 0.0, 0.0)
    assert made.regret("default", held_out=True).where == "b1s3072h8/8d64c-bfloat16"


def test_what_cannot_serve_falls_back_as_serving_does() -> None:
    cannot = probe(2048, 90.0, None)
    made = table(probes=(cannot,))
    assert made.time_us("table", cannot) == 90.0
    assert made.time_us("nearest", cannot) == 90.0
    alone = table(tuned=())
    assert [alone.time_us("nearest", p) for p in alone.probes] == [
        p.default_us for p in alone.probes
    ]
    with pytest.raises(UnknownName, match="strategy 'best'"):
        made.time_us("best", cannot)


def test_a_winner_that_was_the_default_speaks_for_the_default() -> None:
    other = probe(2048, 90.0, 80.0, default=1)  # a default that looks at sizes
    made = table(probes=(other,), tuned=((parse("b1s1536h8d64c"), 0),))
    assert made.time_us("nearest", other) == 90.0
    by_default = table(probes=(other,), tuned=((parse("b1s1536h8d64c"), None),))
    assert by_default.time_us("nearest", other) == 80.0
    assert DispatchTable.from_dict(json.loads(json.dumps(by_default.to_dict()))) == by_default


def test_no_shape_is_no_regret() -> None:
    assert table(probes=(probe(64, 1.0, 2.0),)).regret("table", held_out=True) == (0, 0.0, 0.0, "")


def test_a_table_comes_back_equal_through_json() -> None:
    made = table()
    assert DispatchTable.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def broken(**changes: Any) -> dict[str, Any]:
    return {**table().to_dict(), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken(configs=[SLOW.to_dict()]), "config 1 of a table that has 1"),
        (broken(digests={}), "no digest of triton/fwd"),
        (
            broken(
                probes=[
                    {"problem": "b1s4h8d64c", "held_out": False, "times_us": [1, -1], "default": 0}
                ]
            ),
            "has the times",
        ),
        (
            broken(
                probes=[
                    {
                        "problem": "b1s4h8d64c",
                        "held_out": False,
                        "times_us": [None, 1],
                        "default": 0,
                    }
                ]
            ),
            "has the times",
        ),
        (
            broken(
                leaves=[
                    {
                        "where": [["moon", None, 3]],
                        "config": None,
                        "probes": 1,
                        "mean": 0,
                        "worst": 0,
                    }
                ]
            ),
            "asks for 'moon'",
        ),
    ],
)
def test_a_table_whose_parts_do_not_fit_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DispatchTable.from_dict(data)


def test_of_two_tables_of_a_family_the_newer_serves() -> None:
    old, new = table(), table(created="2026-11-22T00:00:00+00:00")
    assert by_family([new, old]) == {old.family: new}
