"""Is FlexAttention right with the options that are tuned, and is what is found no slower?"""

from __future__ import annotations

import dataclasses

import pytest

from autoflash import build, device
from autoflash.codegen.catalog import installed
from autoflash.config import Config, Value
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning import reference
from autoflash.tuning.tuner import EFFORTS, tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # PyTorch's own, while it compiles
]

TEMPLATE = installed().get("flex/fwd")
TILE: dict[str, Value] = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2}
PROMISES: dict[str, Value] = {"rows_guaranteed_safe": True, "blocks_are_contiguous": True}


def kernel_of(problem: Problem, values: dict[str, Value]) -> build.Kernel:
    here = device.native()
    config = Config.of(TEMPLATE.name, dict(TEMPLATE.default_config(problem, here)) | values)
    if (reason := TEMPLATE.broken(config, problem, here)) is not None:
        pytest.skip(f"not feasible on {here.name}: {reason}")
    return build.build(TEMPLATE.render(config, problem, here), here)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("flex:b2s1024h8/2d128c", {}),
        ("flex:b2s1024h8/2d128c", TILE | PROMISES),
        ("flex:b2s1000x1333h4d64c", TILE | PROMISES | {"use_tma": True}),
        ("flex:b1s1024h4d64cw200cap30-float16", TILE | {"num_stages": 3}),
        ("flex:b1s900x500h4d96c", TILE | {"block_m": 64, "num_warps": 4}),
        ("flex:b1s512h4d64f-float32", {"prescale_qk": True, "rows_guaranteed_safe": True}),
    ],
)
def test_options_leave_the_result_right(name: str, values: dict[str, Value]) -> None:
    problem = Problem.parse(name)
    verdict = reference.check(kernel_of(problem, values), problem, device.native())
    assert verdict.ok, verdict.reason


def test_lse_is_the_natural_logarithm_where_it_is_asked_for() -> None:
    problem = Problem.parse("flex:b2s512x700h8/2d64c")
    case = reference.make_case(problem, device.native())
    inputs = case.inputs
    kernel_of(problem, TILE)(
        inputs.q, inputs.k, inputs.v, inputs.out, inputs.lse, inputs.softmax_scale, problem=problem
    )
    verdict = case.compare(inputs.out, inputs.lse)
    assert verdict.ok, verdict.reason


def test_what_is_found_is_no_slower_than_flexattention_without_options() -> None:
    problem = Problem.parse("flex:b2s2048h16/4d128c-bfloat16")
    effort = dataclasses.replace(EFFORTS["quick"], seconds=90.0)
    with Database.open("sqlite://") as database:
        (result,) = tune([problem], device.native(), database=database, effort=effort, max_trials=4)
        outcomes = [trial.outcome for trial in database.trials(problem=problem)]
    assert result.status in ("improved", "unimproved"), result.reason
    assert result.best is not None
    assert result.best.latency_us <= result.best.default_us
    assert len(outcomes) == 4
    assert outcomes.count("ok") >= 1
