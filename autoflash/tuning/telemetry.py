"""In what state is the GPU while it is being timed: clock, power, temperature, throttling?"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

# Bits of nvmlClocksEventReasons that mean "slower than it could be": power cap, hardware slowdown,
# software and hardware thermal limits, power brake. Idle, application clocks and sync boost do not.
THROTTLE_BITS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80

_INTERVAL_S = 0.02  # a reading costs the host up to a millisecond, and power is a running average


@dataclass(slots=True)
class Readings:
    """What was read while one thing was timed; empty where nothing can be read."""

    clocks_mhz: list[float] = field(default_factory=list)
    powers_w: list[float] = field(default_factory=list)
    temperatures_c: list[float] = field(default_factory=list)
    throttles: list[bool] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The telemetry fields of a Measurement: medians, and whether it ever throttled."""

        def middle(values: list[float]) -> float | None:
            return round(statistics.median(values), 1) if values else None

        return {
            "clock_mhz": middle(self.clocks_mhz),
            "power_w": middle(self.powers_w),
            "temperature_c": middle(self.temperatures_c),
            "throttled": any(self.throttles) if self.throttles else None,
        }


class Telemetry:
    """Reads one GPU through NVML (package nvidia-ml-py); reads nothing where that is missing."""

    def __init__(self, uuid: str | None) -> None:
        """Open NVML for the GPU with that UUID, as CUDA numbers devices otherwise than NVML.

        Args:
            uuid: torch.cuda.get_device_properties(index).uuid as text; None reads nothing.
        """
        self._nvml: Any = None
        self._handle: Any = None
        self._last_read = 0.0
        if uuid is None:
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
            self._nvml = pynvml
        except Exception:  # not installed, no driver, no permission: telemetry is optional
            self._nvml = None

    @property
    def available(self) -> bool:
        """Whether anything can be read."""
        return self._nvml is not None

    @property
    def driver(self) -> str | None:
        """Version of the driver."""
        if not self.available:
            return None
        text = self._nvml.nvmlSystemGetDriverVersion()
        return text.decode() if isinstance(text, bytes) else str(text)

    def read(self, into: Readings) -> None:
        """Append one reading of each kind; a kind that the board does not report is left out."""
        if not self.available:
            return
        now = time.perf_counter()
        if into.clocks_mhz and now - self._last_read < _INTERVAL_S:
            return
        self._last_read = now
        nvml, handle = self._nvml, self._handle
        for values, ask in (
            (into.clocks_mhz, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            (into.powers_w, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            (
                into.temperatures_c,
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            ),
            (into.throttles, lambda: bool(self._throttle_reasons() & THROTTLE_BITS)),
        ):
            try:
                values.append(ask())
            except nvml.NVMLError:
                continue

    def _throttle_reasons(self) -> int:
        nvml = self._nvml  # "throttle" was renamed "event" in the course of driver 535
        new = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        return int((new or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self._handle))
