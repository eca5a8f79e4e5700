from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from autoflash import device as devices
from autoflash import settings
from autoflash.benchmark import ahead
from autoflash.device import KNOWN_GPUS, Device
from autoflash.problem import Problem
from autoflash.tuning.peers import PEERS

ALIKE = [Problem.parse(f"b1s{seqlen}h2d32c-float32") for seqlen in (40, 48)]


@pytest.fixture
def cpu() -> Device:
    return devices.for_arch("cpu")


def _jobs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("AUTOFLASH_JOBS", str(count))
    settings.get.cache_clear()


def test_what_will_serve_is_compiled_once(
    cpu: Device, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _jobs(monkeypatch, 2)
    built = []
    monkeypatch.setattr(ahead.build, "compile_source", lambda source, device: built.append(source))
    announced: list[int] = []
    other = Problem.parse("b1s40h2d64f-float32")
    count = ahead.build_ahead(
        [*ALIKE, other], cpu, ["autoflash", "sdpa", "flex"], on_start=announced.append
    )
    assert [count] == announced == [len(built)]
    # Both lengths of one kind are served by one kernel, and flex runs on no CPU.
    assert count == len({source.digest for source in built}) == 2
    assert {source.template for source in built} == {"cpp/fwd"}


def test_a_kernel_that_cannot_be_compiled_fails_in_its_turn(
    cpu: Device, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _jobs(monkeypatch, 2)
    monkeypatch.setenv("AUTOFLASH_CXX", "/nowhere/c++")
    settings.get.cache_clear()
    assert ahead.build_ahead([*ALIKE, ALIKE[0]], cpu, ["autoflash"]) == 1


@pytest.mark.parametrize(("jobs", "problems"), [(1, ALIKE), (4, ALIKE[:1])])
def test_nothing_is_done_ahead_where_that_gains_nothing(
    jobs: int, problems: list[Problem], cpu: Device, cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _jobs(monkeypatch, jobs)
    announced: list[int] = []
    assert ahead.build_ahead(problems, cpu, ["autoflash"], on_start=announced.append) == 0
    assert not announced


def test_flex_compiles_in_processes_that_leave_binaries_only(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _jobs(monkeypatch, 4)
    monkeypatch.setattr(ahead, "_triton_cache", lambda: "/cache/of/triton")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/where/choices/are/kept")
    ran: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], **options: Any) -> None:
        assert Path(options["env"]["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
        ran.append((command, options))
        raise subprocess.TimeoutExpired(command, options["timeout"])  # not an error of ours

    monkeypatch.setattr(ahead.subprocess, "run", run)
    problems = [Problem.parse(f"b1s{seqlen}h2d64c") for seqlen in (128, 256, 512)]
    impossible = Problem.parse("b1s128h2d64c-float8_e4m3fn")
    count = ahead.build_ahead([*problems, impossible], KNOWN_GPUS["sm90"], ["cudnn", "flex"])
    assert count == len(ran) == 3
    assert all("run_once('flex', " in command[-1] for command, _ in ran)
    assert {name for p in problems for command, _ in ran if (name := p.name) in command[-1]} == {
        p.name for p in problems
    }
    scratch = {options["env"]["TORCHINDUCTOR_CACHE_DIR"] for _, options in ran}
    assert len(scratch) == 3
    assert "/where/choices/are/kept" not in scratch
    assert not any(Path(place).exists() for place in scratch)
    assert {options["env"]["TRITON_CACHE_DIR"] for _, options in ran} == {"/cache/of/triton"}
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/where/choices/are/kept"


def test_the_child_calls_the_peer_once(cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    native = PEERS["naive"]

    def available(problem: Problem, device: Device, *args: Any, **options: Any) -> None:
        q, k, v, names = args
        assert q.shape == (1, 40, 2, 32)
        calls.extend(names)
        native.make(q, k, v, problem)()

    monkeypatch.setattr(ahead, "available", available)
    monkeypatch.setattr("autoflash.device.native", lambda: cpu)
    ahead.run_once("naive", ALIKE[0].name)
    assert calls == ["naive"]


def test_where_pytorch_keeps_binaries_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/inductor")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert ahead._triton_cache() == "/inductor/triton/3"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert ahead._triton_cache() == "/elsewhere"
