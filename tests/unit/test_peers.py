from __future__ import annotations

import math
import sys
import types
import warnings
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
    promised = ("sdpa", "cudnn", "fa2", "efficient", "math", "flex", "flex_default", "flash_attn2",
                "flash_attn3", "fa4", "naive")  # fmt: skip
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


@pytest.mark.parametrize(
    ("name", "able"),
    [
        ("b2s70h2d32cw20-float32", {"sdpa", "math", "naive"}),
        ("b1s50x90h4/2d40fw7x3-bfloat16", {"sdpa", "math", "naive"}),
        ("b1s90x50h2d24fwinfx4-float32", {"sdpa", "math", "naive"}),
        ("b1s64h4/2d64ccap5-bfloat16", {"naive"}),
        ("b1s50x90h4/2d40cw20cap50-float32", {"naive"}),
        ("b1s64h4/2d64c-float8_e4m3fn", {"naive"}),
        ("b2s50x70h2d64fw9x5cap20-float8_e4m3fn", {"naive"}),
    ],
)
def test_windows_softcap_and_8_bits_on_a_cpu(name: str, able: set[str], cpu: Device) -> None:
    problem = Problem.parse(name)
    case = make_case(problem, cpu)
    inputs = case.inputs
    before = inputs.fingerprint()
    calls, reasons = available(problem, cpu, inputs.q, inputs.k, inputs.v, descales=inputs.descales)
    assert set(calls) == able
    assert set(calls) | set(reasons) == set(PEERS)
    for peer, call in calls.items():
        out = call()
        assert out.dtype == getattr(torch, problem.out_dtype)
        verdict = case.compare(out, layout=PEERS[peer].layout)
        assert verdict.ok, f"{peer}: {verdict.reason}"
    assert inputs.fingerprint() == before


@pytest.mark.parametrize(
    "name",
    ["b1s64x90h4/2d32cw20", "b1s64h2d32fw9x5", "b1s40x64h2d32ccap5", "b1s64h2d32fw0xinfcap9"],
)
def test_flex_is_told_of_windows_and_softcap(
    name: str, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Uncompiled it is the same formula: compiling takes a minute and a GPU (tests/gpu).
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = Problem.parse(name, "float32")
    case = make_case(problem, cpu)
    inputs = case.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of running uncompiled
        out = PEERS["flex"].make(inputs.q, inputs.k, inputs.v, problem)()
    verdict = case.compare(out, layout="bhsd")
    assert verdict.ok, verdict.reason


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
        ("cudnn", "b1s64h1d64cw8", "sm90", "no sliding window"),
        ("fa2", "b1s64h1d64fw8x8", "sm90", "no sliding window"),
        ("efficient", "b1s80x64h1d64fwinfx8", "sm90", "rows see no key"),
        ("efficient", "b1s131072h1d64cw8", "sm90", "mask of 48.0 GiB"),
        ("sdpa", "b1s80x64h1d64cw8", "sm90", "rows see no key"),
        ("sdpa", "b1s64h1d64ccap50", "sm90", "no softcap"),
        ("cudnn", "b1s64h1d64ccap50", "sm90", "no softcap"),
        ("flex", "b1s64h1d64c-float8_e4m3fn", "sm90", "takes no float8_e4m3fn"),
        ("fa4", "b1s64h1d64c-float8_e4m3fn", "sm90", "takes no float8_e4m3fn"),
        ("flash_attn3", "b1s64h1d64c-float32", "sm90", "no float32"),
        ("naive", "fwd_other:b1s64h1d64c", "cpu", "op fwd_other is not compared"),
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
    for name in ("sdpa", "efficient", "flex"):
        assert PEERS[name].unavailable(Problem.parse("b4s4096h32d128cw128"), H100) is None
    assert PEERS["flex"].unavailable(Problem.parse("b4s4096h32d128cw128cap50"), H100) is None


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


@pytest.mark.parametrize(
    ("peer", "module"),
    [
        ("flash_attn2", "flash_attn.flash_attn_interface"),
        ("flash_attn3", "flash_attn_interface"),
        ("fa4", "flash_attn.cute"),
    ],
)
@pytest.mark.parametrize(
    ("mask", "window", "softcap"),
    [
        ("c", None, None),
        ("cw5", (5, 0), None),
        ("fw5x3", (5, 3), None),
        ("fwinfx3", (None, 3), None),
        ("fw0xinf", (0, None), None),
        ("ccap50", None, 50.0),
        ("cw5cap20", (5, 0), 20.0),
    ],
)
def test_packages_are_told_of_windows_and_softcap_in_their_own_terms(
    peer: str, module: str, mask: str, window: tuple[int | None, int | None] | None,
    softcap: float | None, monkeypatch: pytest.MonkeyPatch, cpu: Device,
) -> None:  # fmt: skip
    problem = Problem.parse(f"b1s9x12h2d64{mask}-bfloat16")
    asked: list[dict[str, object]] = []

    def flash_attn_func(q: torch.Tensor, *_: torch.Tensor, **options: object) -> torch.Tensor:
        asked.append(options)
        return q

    _module(monkeypatch, module, flash_attn_func)
    assert PEERS[peer].unavailable(problem, H100) is None
    inputs = make_inputs(problem, cpu)
    PEERS[peer].make(inputs.q, inputs.k, inputs.v, problem)()
    wanted: dict[str, object] = {"softmax_scale": 1 / math.sqrt(64), "causal": mask[0] == "c"}
    if window is not None:  # no bound: None in FlashAttention 4, -1 before
        ends = window if peer == "fa4" else tuple(-1 if end is None else end for end in window)
        wanted["window_size"] = ends
    if softcap is not None:
        wanted["softcap"] = softcap
    assert asked == [wanted]


def test_flash_attention_3_gets_8_bits_and_their_descales(
    monkeypatch: pytest.MonkeyPatch, cpu: Device
) -> None:
    problem = Problem.parse("b2s9h4/2d64c-float8_e4m3fn")
    inputs = make_inputs(problem, cpu)
    asked: list[dict[str, object]] = []

    def flash_attn_func(q: torch.Tensor, *_: torch.Tensor, **options: object) -> torch.Tensor:
        assert q.dtype == torch.float8_e4m3fn
        asked.append(options)
        return q.to(torch.bfloat16)

    _module(monkeypatch, "flash_attn_interface", flash_attn_func)
    assert PEERS["flash_attn3"].unavailable(problem, H100) is None
    PEERS["flash_attn3"].make(inputs.q, inputs.k, inputs.v, problem, inputs.descales)()
    [options] = asked
    for name, descale in zip("qkv", inputs.descales, strict=True):
        assert options[f"{name}_descale"] is descale


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
