"""Records of every outcome, as a search would have stored them, for tests of the report."""

from __future__ import annotations

import dataclasses
from typing import Any

from autoflash.config import Config
from autoflash.device import KNOWN_GPUS, Device
from autoflash.problem import Problem
from autoflash.record import Measurement, Record

GPU = dataclasses.replace(KNOWN_GPUS["sm90"], name="NVIDIA Test", memory_gbps=4000.0)
CAUSAL = Problem.parse("b4s4096h16d128c-bfloat16")
FULL = Problem.parse("b1s1024h8d64f-bfloat16")
TIMED, MODEL = "gpu-test", "model-test"
DIGEST = "d1"


def trial(
    problem: Problem = CAUSAL,
    us: float | None = 100.0,
    outcome: str = "ok",
    device: Device = GPU,
    second: int = 0,
    **more: Any,
) -> Record:
    """One record; `tunables` of its config are among `more`."""
    values = more.pop("tunables", {"block_m": 128, "num_stages": 2})
    clock = more.pop("clock_mhz", 1900)
    measured = outcome in ("ok", "slow") and us is not None
    fields: dict[str, Any] = {
        "problem": problem,
        "config": Config.of(more.pop("template", "cuda/test"), values),
        "template_digest": DIGEST,
        "device": device,
        "outcome": outcome,
        "policy": MODEL if outcome == "predicted" else TIMED,
        "measurement": Measurement(
            latency_us=us, p20_us=us, p80_us=us, count=9, clock_mhz=clock, power_w=600.0,
            temperature_c=55.0, throttled=clock is not None and clock < 1800,
        ) if measured and us else None,
        "predicted_us": us if outcome == "predicted" else None,
        "environment": {"torch": "2.13.0", "driver": "580.1"},
        "created": f"2026-11-21T10:{second // 60 % 60:02d}:{second % 60:02d}Z",
    }  # fmt: skip
    return Record(**{**fields, **more})


def winner(problem: Problem = CAUSAL, us: float = 80.0, **more: Any) -> Record:
    """A record as finals leave it."""
    rivals = {"default_us": 1.25 * us, "torch_us": 1.5 * us, "torch_provider": "cudnn"}
    return trial(problem, us, **{**rivals, **more})


def search() -> list[Record]:
    """Trials of two problems, two of them failed, in their order."""
    return [
        trial(CAUSAL, 200.0, second=0, tunables={"block_m": 64, "num_stages": 2}),
        trial(CAUSAL, 100.0, second=10, tunables={"block_m": 128, "num_stages": 2}),
        trial(CAUSAL, None, "compile_error", second=20, tunables={"block_m": 192, "num_stages": 2},
              reason="compiling: 300 registers are too many"),
        trial(CAUSAL, 400.0, "slow", second=30, tunables={"block_m": 64, "num_stages": 3},
              reason="4.0x the best so far"),
        trial(CAUSAL, 99.5, second=40, tunables={"block_m": 128, "num_stages": 3}, clock_mhz=1700),
        trial(FULL, 20.0, second=50, tunables={"block_m": 64, "num_stages": 2}),
        trial(FULL, None, "wrong_result", second=60, tunables={"block_m": 128, "num_stages": 2},
              reason="<script>alert(1)</script> & error 3.5"),
    ]  # fmt: skip
