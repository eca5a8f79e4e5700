"""What kernels are called with when they are timed, and what PyTorch they are timed beside."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autoflash import device as devices
from autoflash.build.kernel import Artifact, Kernel, Launch, Resources
from autoflash.codegen import ops
from autoflash.codegen.template import Source
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.tuning.evaluate import _Bench


@pytest.fixture
def cpu() -> Device:
    return devices.for_arch("cpu")


class Recorder(Kernel):
    """Computes nothing and notes what it was bound to and called with."""

    def __init__(self, problem: Problem) -> None:
        source = Source("test/recorder", "python", "", problem.op, problem.dtype, True, {})
        super().__init__(Artifact(source, "cpu", "", Path(), Resources(0.0, 0)))
        self.bound: dict[str, int | float] = {}
        self.given: dict[str, int | float] = {}

    def prepare(self, scalars: tuple[int | float, ...]) -> Launch:
        op = ops.get(self.artifact.source.op)
        names = [argument.name for argument in op.scalars]
        self.bound = dict(zip(names, scalars, strict=True))

        def launch(*arguments: int | float) -> None:
            names = [argument.name for argument in op.pointers]
            called = zip([*names, "softmax_scale", "last"], arguments, strict=True)
            self.given = dict(called)

        return launch


@pytest.mark.parametrize(
    ("name", "window", "softcap"),
    [
        ("b2s30x50h4/2d16f-float32", (50, 30), 0.0),
        ("b2s30x50h4/2d16c-float32", (50, 0), 0.0),
        ("b2s30x50h4/2d16cw7-float32", (7, 0), 0.0),
        ("b2s30x50h4/2d16fw7x3cap20-bfloat16", (7, 3), 20.0),
        ("b2s30x50h4/2d16fwinfx3-bfloat16", (50, 3), 0.0),
        ("b2s30x50h4/2d16cw7cap20-float8_e4m3fn", (7, 0), 20.0),
    ],
)
def test_a_timed_kernel_gets_window_softcap_and_descales(
    name: str, window: tuple[int, int], softcap: float, cpu: Device
) -> None:
    problem = Problem.parse(name)
    bench, kernel = _Bench(problem, cpu, 0), Recorder(problem)
    inputs = bench.inputs
    bench.call(kernel)()
    bound, given = kernel.bound, kernel.given
    assert (bound["window_left"], bound["window_right"]) == window
    assert bound["softcap"] == softcap
    assert (bound["batch"], bound["seqlen_q"], bound["seqlen_k"]) == (2, 30, 50)
    assert (bound["num_heads"], bound["num_kv_heads"]) == (4, 2)
    for tensor in ("q", "k", "v", "out"):
        assert given[tensor] == getattr(inputs, tensor).data_ptr()
        assert bound[f"{tensor}_stride_head"] == getattr(inputs, tensor).stride(2)
    assert given["lse"] == 0  # as attention() makes it by default
    assert given["softmax_scale"] == 1 / math.sqrt(16)
    named = dict(zip(("q_descale", "k_descale", "v_descale"), inputs.descales, strict=False))
    assert len(named) == (3 if problem.op == "fwd_fp8" else 0)
    assert {k: given[k] for k in given if k.endswith("_descale")} == {
        name: descale.data_ptr() for name, descale in named.items()
    }


@pytest.mark.parametrize(
    ("name", "rivals"),
    [
        ("b1s40h2d16cw7-float32", {"sdpa"}),
        ("b1s40h2d16ccap20-float32", {None}),
        ("b1s40h2d16c-float8_e4m3fn", {None}),
    ],
)
def test_pytorch_takes_part_in_the_finals_where_it_can(
    name: str, rivals: set[str | None], cpu: Device
) -> None:
    provider, call = _Bench(Problem.parse(name), cpu, 0).best_of_torch()
    assert provider in rivals
    assert (call is None) == (provider is None)
    if call is not None:
        assert tuple(call().shape) == (1, 2, 40, 16)  # type: ignore[attr-defined]
