from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from autoflash import device as devices
from autoflash.device import KNOWN_GPUS, Device
from autoflash.errors import UnknownName
from autoflash.problem import Problem
from autoflash.tuning import peers
from autoflash.tuning.expected import make_case
from autoflash.tuning.inputs import make_inputs
from autoflash.tuning.peers import PEERS, available

H100 = KNOWN_GPUS["sm90"]


@pytest.fixture
def cpu() -> Device:
    return devices.for_arch("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peers._import_failure.cache_clear()
    yield
    peers._import_failure.cache_clear()
    torch.set_num_threads(threads)


def test_the_peers_are_those_a_benchmark_promises() -> None:
    promised = ("sdpa", "cudnn", "fa2", "efficient", "math", "flex", "flash_attn2", "flash_attn3",
                "fa4", "naive")  # fmt: skip
    assert tuple(PEERS) == promised
    assert all(peer.name == name for name, peer in PEERS.items())
    assert set(peers.TORCH_PEERS) < set(PEERS)
    with pytest.raises(UnknownName, match="fa5"):
        peers.get("fa5")


@pytest.mark.parametrize(
    "name",
    [
        "b2s70h2d32c-float32",
        "b1s64h4/2d64f-bfloat16",
        "b1s50x90h4/2d40c-bfloat16",
        "b1s90x50h2d24c-float32",
        "b1s1x70h4/1d64c-float16",
        "b1s33h2d16x40f-float32",
        "b1s33h2d16c-float32-unaligned",
    ],
)
def test_what_runs_on_a_cpu_is_right(name: str, cpu: Device) -> None:
    problem = Problem.parse(name)
    case = make_case(problem, cpu)
    inputs = case.inputs
    calls, reasons = available(problem, cpu, inputs.q, inputs.k, inputs.v)
    assert set(calls) == {"sdpa", "math", "naive"}
    assert set(calls) | set(reasons) == set(PEERS)
    for peer, call in calls.items():
        verdict = case.compare(call(), layout=PEERS[peer].layout)
        assert verdict.ok, f"{peer}: {verdict.reason}"


def test_a_peer_gets_contiguous_inputs_and_leaves_ours_alone(cpu: Device) -> None:
    problem = Problem.parse("b2s9h4/2d16f-float32-unaligned")
    inputs = make_inputs(problem, cpu)
    before = inputs.fingerprint()
    for name in ("sdpa", "naive"):
        PEERS[name].make(inputs.q, inputs.k, inputs.v, problem)()
    assert inputs.fingerprint() == before


@pytest.mark.parametrize(
    ("peer", "problem", "device", "reason"),
    [
        ("cudnn", "b1s8h1d64c", "cpu", "GPUs only"),
        ("cudnn", "b1s8h1d64c-float32", "sm90", "no float32"),
        ("cudnn", "b1s8h1d20c", "sm90", "multiple of 8"),
        ("efficient", "b1s9x8h1d64c", "sm90", "rows see no key"),
        ("fa2", "b1s8h1d64x32c", "sm90", "must equal head_dim 64"),
        ("fa2", "b1s8h1d512c", "sm90", "over its 256"),
        ("math", "b1s16384h32d64c", "sm90", "48.0 GiB of scores"),
        ("naive", "b4s4096h32d64c-float32", "cpu", "16.0 GiB of scores"),
        ("flash_attn3", "b1s8h1d64c", "sm100", "sm8x, sm9x"),
        ("flash_attn2", "b1s8h1d64c", "sm90", "flash-attn is not installed"),
        ("flash_attn3", "b1s8h1d64c", "sm90", "flash-attn-3 is not installed"),
        ("fa4", "b1s8h1d64c", "sm90", "flash-attn-4 is not installed"),
        ("sdpa", "b1s8x0h1d64c", "sm90", "without rows or keys"),
    ],
)
def test_a_peer_says_what_keeps_it_from_running(
    peer: str, problem: str, device: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    said = PEERS[peer].unavailable(Problem.parse(problem), devices.for_arch(device))
    assert said is not None
    assert reason in said


def test_a_peer_that_can_run_says_nothing() -> None:
    problem = Problem.parse("b4s4096h32/8d128c")
    for name in ("sdpa", "cudnn", "fa2", "efficient", "flex"):
        assert PEERS[name].unavailable(problem, H100) is None


def _module(monkeypatch: pytest.MonkeyPatch, name: str, function: object) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.flash_attn_func = function  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("peer", "module", "gives_lse"),
    [
        ("flash_attn2", "flash_attn.flash_attn_interface", False),
        ("flash_attn3", "flash_attn_interface", False),
        ("fa4", "flash_attn.cute", True),
    ],
)
def test_packages_are_called_as_they_want_to_be(
    peer: str, module: str, gives_lse: bool, monkeypatch: pytest.MonkeyPatch, cpu: Device
) -> None:
    problem = Problem.parse("b2s9x12h4/2d64c-float32")
    asked: list[tuple[float, bool]] = []

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> object:
        asked.append((softmax_scale, causal))
        assert q.shape == (2, 9, 4, 64)
        assert k.shape == (2, 12, 2, 64)
        assert q.is_contiguous()
        assert v.is_contiguous()
        out = q + 1
        return (out, None) if gives_lse else out

    _module(monkeypatch, module, flash_attn_func)
    assert PEERS[peer].unavailable(Problem.parse("b1s8h1d64c"), H100) is None
    inputs = make_inputs(problem, cpu)
    out = PEERS[peer].make(inputs.q, inputs.k, inputs.v, problem)()
    assert torch.equal(out, inputs.q + 1)
    assert asked == [(1 / math.sqrt(64), True)]


def test_a_package_that_is_broken_says_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("import nothing_of_that_name\n")  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    said = PEERS["flash_attn3"].unavailable(Problem.parse("b1s8h1d64c"), H100)
    assert said == "package flash-attn-3 needs module nothing_of_that_name, which is not installed"
    peers._import_failure.cache_clear()
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol')\n")  # type: ignore[operator]
    said = PEERS["flash_attn3"].unavailable(Problem.parse("b1s8h1d64c"), H100)
    assert said is not None
    assert "undefined symbol" in said


def test_a_peer_that_fails_when_run_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, cpu: Device
) -> None:
    def make(*_: object) -> peers.Call:
        def call() -> torch.Tensor:
            raise RuntimeError("No available kernel. Aborting execution.\nmore")

        return call

    broken = peers._peer("broken", "test", "bhsd", make)
    monkeypatch.setitem(peers.PEERS, "broken", broken)
    problem = Problem.parse("b1s8h1d16f-float32")
    inputs = make_inputs(problem, cpu)
    names = ("broken", "naive")
    calls, reasons = available(problem, cpu, inputs.q, inputs.k, inputs.v, names)
    assert list(calls) == ["naive"]
    assert reasons == {"broken": "RuntimeError: No available kernel. Aborting execution."}
