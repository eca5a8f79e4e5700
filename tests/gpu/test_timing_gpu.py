"""Times, references and peers on a real device. Nothing here depends on how fast it is."""

from __future__ import annotations

import time

import pytest
import torch

from autoflash import device as devices
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.tuning import formula
from autoflash.tuning.environment import environment
from autoflash.tuning.expected import make_case
from autoflash.tuning.peers import PEERS, available
from autoflash.tuning.timing import Timer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Device:
    return devices.native()


@pytest.fixture(scope="module")
def timer(gpu: Device) -> Timer:
    return Timer(gpu)


def test_python_before_a_launch_is_not_timed(timer: Timer) -> None:
    tensor = torch.zeros(1024, device="cuda")

    def slow_to_launch() -> None:
        until = time.perf_counter() + 300e-6
        while time.perf_counter() < until:
            pass
        tensor.add_(1)

    found = timer.measure(slow_to_launch, budget_ms=5, min_calls=50)
    assert found.count >= 50
    assert 0 < found.latency_us < 150  # the kernel takes a few


def test_the_flush_covers_the_cache(timer: Timer, gpu: Device) -> None:
    clock = timer._clock
    buffer = clock._flush_buffer  # type: ignore[attr-defined]
    assert buffer.numel() * buffer.element_size() >= 2 * gpu.l2_bytes > 0


def test_nothing_is_faster_than_the_device(timer: Timer, gpu: Device) -> None:
    size = 4096
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    found = timer.measure(lambda: a @ a, budget_ms=50)
    floor_us = 2 * size**3 / (gpu.tflops_16bit * 1e6)
    assert found.latency_us > floor_us / 1.1  # boost above the datasheet's clock
    assert found.latency_us < 20 * floor_us
    assert found.p20_us <= found.latency_us <= found.p80_us


def test_one_call_under_two_names_ties(timer: Timer) -> None:
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        return a @ a

    found = timer.interleave({"a": call, "b": call}, rounds=10, budget_ms=60)
    assert not found.beats("a", "b")
    assert not found.beats("b", "a")
    assert found.compare("a", "b").ratio == pytest.approx(1, abs=0.1)


def test_twice_the_work_loses(timer: Timer) -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def twice() -> None:
        a @ a
        a @ a

    found = timer.interleave({"one": lambda: a @ a, "two": twice}, rounds=6, budget_ms=60)
    assert found.beats("one", "two")
    assert found.compare("two", "one").ratio == pytest.approx(2, rel=0.25)


def test_telemetry_is_plausible_where_nvml_is(timer: Timer) -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    short = timer.measure(lambda: a @ a, budget_ms=20)
    assert short.power_w is None  # the board's reading is older than that
    found = timer.measure(lambda: a @ a, budget_ms=400, max_calls=10_000)
    assert found.clock_mhz is not None
    assert 200 < found.clock_mhz < 4000
    assert found.power_w is None or 30 < found.power_w < 3000
    assert found.temperature_c is None or 0 < found.temperature_c < 120
    assert found.throttled in (True, False)


def test_environment_names_the_driver_and_cuda(gpu: Device) -> None:
    facts = environment(gpu)
    assert facts["cuda"] == torch.version.cuda
    assert facts["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    "name",
    [
        "b2s1024h4d64c",
        "b2s1024h8/2d128f-float16",
        "b1s500x900h4/2d128c",
        "b1s500x900h4d64c",
        "b1s900x500h4d64c",
        "b1s1x4096h8/2d128c",
        "b1s512h2d256c-float32",
        "b1s300h2d80f-bfloat16-unaligned",
        "b1s16384h8d64c",
        "b2s1024h4d64cw100",
        "b1s1000x1500h4d128fw200x50-float16",
        "b1s900x500h4d64cw64",
        "b1s8192h8d64cw1024",
        "b2s1024h8/2d128ccap50",
        "b1s1024x1500h4d256cw300cap50",
        "b2s1024h4d128c-float8_e4m3fn",
        "b1s500x900h4/2d64fw90x30-float8_e4m3fn",
    ],
)
def test_every_peer_that_runs_is_right(name: str, gpu: Device) -> None:
    problem = Problem.parse(name)
    case = make_case(problem, gpu)
    inputs = case.inputs
    names = [name for name in PEERS if name != "flex"]  # compiles for a minute
    given = (inputs.q, inputs.k, inputs.v)
    calls, reasons = available(problem, gpu, *given, names, descales=inputs.descales)
    able = {"naive"}
    if not problem.softcapped and problem.op == "fwd":
        able |= {"math"} if problem.local else {"math", "sdpa"}
    assert able <= set(calls), reasons
    wrong = {}
    for peer, call in calls.items():
        verdict = case.compare(call(), layout=PEERS[peer].layout)
        if not verdict.ok:
            wrong[peer] = verdict.reason
    assert not wrong, wrong


@pytest.mark.slow
def test_flex_is_right_and_fused(gpu: Device, timer: Timer) -> None:
    for name in ("b1s1000x2048h4/2d64c", "b1s1000x2048h4/2d64fw300x40cap30", "b2s2048h16d128c"):
        problem = Problem.parse(name)
        case = make_case(problem, gpu)
        inputs = case.inputs
        calls, reasons = available(problem, gpu, inputs.q, inputs.k, inputs.v, ["flex", "naive"])
        assert "flex" in calls, reasons
        verdict = case.compare(calls["flex"](), layout="bhsd")
        assert verdict.ok, verdict.reason
    found = timer.interleave(calls, rounds=5, budget_ms=20)
    assert found.beats("flex", "naive")


@pytest.mark.parametrize("tf32", [True, False])
def test_the_reference_uses_no_tf32(tf32: bool, gpu: Device) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        problem = Problem.parse("b1s512h4d64f-float32")
        case = make_case(problem, gpu)
        inputs = case.inputs
        assert matmul.fp32_precision == ("tf32" if tf32 else "ieee")
        q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
        out = formula.naive(q, k, v, causal=False, softmax_scale=inputs.softmax_scale)
    finally:
        matmul.fp32_precision = before
    verdict = case.compare(out, layout="bhsd")
    assert verdict.ok == (not tf32), verdict
