"""Record: what was learned about one config on one problem and device, whatever the outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoflash.config import Config
from autoflash.device import Device
from autoflash.problem import Problem

OUTCOMES = {
    "ok": "correct and timed",
    "predicted": "compiled for an absent device and ranked by the static model",
    "infeasible": "a constraint rejected it before it was rendered",
    "compile_error": "the compiler rejected it",
    "over_resources": "it needs more registers or shared memory than the device has",
    "wrong_result": "its error is larger than the rule allows",
    "runtime_error": "it raised when launched",
    "timeout": "it did not finish in time and its process was killed",
    "crash": "the process that ran it died",
    "slow": "dropped by racing: hopelessly slower than the best so far",
}
"""Every outcome a trial can have, with its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How long one call took, over several calls.

    Attributes:
        latency_us: median.
        p20_us: 20th percentile.
        p80_us: 80th percentile.
        count: calls timed.
        clock_mhz: median SM clock while timing, where it can be read.
        power_w: median board power, likewise; None where turns were too short to tell it apart
            from that of other calls (autoflash.tuning.telemetry).
        temperature_c: likewise.
        throttled: whether the driver gave a reason for a reduced clock.
    """

    latency_us: float
    p20_us: float
    p80_us: float
    count: int
    clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form without the fields that are None."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Inverse of `to_dict`."""
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One trial, or the winner of a search: problem, config, device and what came of them.

    Attributes:
        problem: what was asked.
        config: what was tried.
        template_digest: of the template at that time; the record holds only while it stands.
        device: where.
        outcome: a key of OUTCOMES.
        policy: how it was timed (tuning.timing.Policy.id); records of different policies are
            never compared.
        reason: for a failure, the first line of why.
        measurement: the time, where outcome is "ok" (or "slow", then of few calls).
        predicted_us: the static model's estimate, where outcome is "predicted".
        default_us: latency of the template default, timed interleaved with this one.
        torch_us: latency of PyTorch's best, likewise.
        torch_provider: which of PyTorch's implementations that was ("cudnn", "fa2", ...).
        error_ratio: largest error over the error of PyTorch in the same precision.
        resources: build.Resources as a dict.
        source_digest: of the rendered source; equal sources are not measured twice.
        environment: versions of what took part (tuning.environment.environment).
        created: UTC, ISO 8601 to the second.
    """

    problem: Problem
    config: Config
    template_digest: str
    device: Device
    outcome: str
    policy: str
    reason: str = ""
    measurement: Measurement | None = None
    predicted_us: float | None = None
    default_us: float | None = None
    torch_us: float | None = None
    torch_provider: str | None = None
    error_ratio: float | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    source_digest: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def latency_us(self) -> float | None:
        """Measured median, else the prediction."""
        return self.measurement.latency_us if self.measurement else self.predicted_us

    @property
    def is_measured(self) -> bool:
        """Whether hardware, not a model, produced the time."""
        return self.outcome == "ok" and self.measurement is not None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: the line format of tuning_db/*.jsonl."""
        data: dict[str, Any] = {
            "problem": self.problem.to_dict(),
            "config": self.config.to_dict(),
            "device": self.device.to_dict(),
            "measurement": self.measurement.to_dict() if self.measurement else None,
        }
        for entry in dataclasses.fields(self):
            if entry.name not in data:
                value = getattr(self, entry.name)
                data[entry.name] = dict(value) if isinstance(value, Mapping) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Inverse of `to_dict`; raises KeyError, TypeError or InvalidInput on a damaged one."""
        measurement = data.get("measurement")
        return cls(
            **{
                **data,
                "problem": Problem.from_dict(data["problem"]),
                "config": Config.from_dict(data["config"]),
                "device": Device.from_dict(data["device"]),
                "measurement": Measurement.from_dict(measurement) if measurement else None,
            }
        )
