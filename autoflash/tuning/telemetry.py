"""In what state is the GPU while it is being timed: clock, power, temperature, throttling?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# Bits of nvmlClocksEventReasons that mean "slower than it could be": power cap, hardware slowdown,
# software and hardware thermal limits, power brake. Idle, application clocks and sync boost do not.
THROTTLE_BITS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80

_INTERVAL_S = 0.02  # a reading costs the host up to a millisecond

SETTLED_S = 0.005
"""A clock read earlier in a call's turn may still be that of the call before it."""
POWER_AFTER_S = 0.13
"""Power read earlier in a turn is partly that of the call before it: what the board gives as power
of the instant is renewed every 100 ms from the last 25 on an H100 (arXiv 2312.02741). The usual
reading is a mean over a second, in which many other calls may have had their turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The state of the board at one instant; None for what it does not report.

    Attributes:
        age_s: since the turn of the call that was at work began.
        clock_mhz: of the SMs.
        power_w: of the board.
        temperature_c: of the GPU.
        throttled: whether the driver gave a reason for a reduced clock.
    """

    age_s: float
    clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    throttled: bool | None


class Readings:
    """What was read while one call was timed, over all its turns; empty where there is no NVML."""

    def __init__(self) -> None:
        self.taken: list[Reading] = []
        self._began_s = -math.inf
        self._last_s = -math.inf

    def begin(self) -> None:
        """A turn begins: what the device did until now was not this call."""
        self._began_s = time.perf_counter()

    def is_due(self) -> bool:
        """Whether it is time for another; a turn that lasts long enough has a settled one."""
        now = time.perf_counter()
        early = self._last_s - self._began_s < SETTLED_S <= now - self._began_s
        return early or now - self._last_s >= _INTERVAL_S

    def age_s(self) -> float:
        """How long the turn has lasted; a reading is taken now."""
        self._last_s = time.perf_counter()
        return self._last_s - self._began_s

    def summary(self) -> dict[str, Any]:
        """The telemetry fields of a Measurement: medians, and whether it ever throttled.

        Power is None where no turn was long enough for it.
        """
        taken = [one for one in self.taken if one.age_s >= SETTLED_S] or self.taken
        throttles = [one.throttled for one in taken if one.throttled is not None]
        return {
            "clock_mhz": _middle(one.clock_mhz for one in taken),
            "power_w": _middle(one.power_w for one in taken if one.age_s >= POWER_AFTER_S),
            "temperature_c": _middle(one.temperature_c for one in taken),
            "throttled": any(throttles) if throttles else None,
        }


def _middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 1) if known else None


class Telemetry:
    """Reads one GPU through NVML (package nvidia-ml-py); reads nothing where that is missing."""

    def __init__(self, uuid: str | None) -> None:
        """Open NVML for the GPU with that UUID, as CUDA numbers devices otherwise than NVML.

        Args:
            uuid: torch.cuda.get_device_properties(index).uuid as text; None reads nothing.
        """
        self._nvml: Any = None
        self._handle: Any = None
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
        """Add a reading; to be called while the device is at work on what is being timed."""
        if not self.available:
            return
        nvml, handle = self._nvml, self._handle
        throttled = self._ask(lambda: self._throttle_reasons() & THROTTLE_BITS)
        into.taken.append(
            Reading(
                age_s=into.age_s(),
                clock_mhz=self._ask(
                    lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
                ),
                power_w=self._ask(self._power_w),
                temperature_c=self._ask(
                    lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
                ),
                throttled=None if throttled is None else bool(throttled),
            )
        )

    def _ask(self, question: Callable[[], float]) -> float | None:
        try:
            return question()
        except self._nvml.NVMLError:  # not reported by this board or driver
            return None

    def _power_w(self) -> float:
        nvml = self._nvml
        (found,) = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if found.nvmlReturn:
            raise nvml.NVMLError(found.nvmlReturn)
        return float(found.value.uiVal) / 1000

    def _throttle_reasons(self) -> int:
        nvml = self._nvml  # "throttle" was renamed "event" in the course of driver 535
        new = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        return int((new or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self._handle))
