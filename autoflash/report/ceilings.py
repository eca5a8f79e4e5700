"""How fast can a device multiply and move data at most, and who says so?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.problem import ELEMENT_SIZES

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The two bounds of a roofline.

    Attributes:
        device_key: of which device.
        measured: by benchmarks/ceilings.py; otherwise they are what autoflash.device states.
        tflops: dtype -> rate of matrix products.
        memory_gbps: bandwidth of the memory.
        origin: how they came about, in words.
    """

    device_key: str
    measured: bool
    tflops: Mapping[str, float]
    memory_gbps: float
    origin: str

    @classmethod
    def stated(cls, device: Device) -> Ceilings:
        """Those of the datasheet (GPU), or of core count and instruction set (CPU)."""
        rates = {dtype: device.tflops_peak(dtype) for dtype in ELEMENT_SIZES}
        return cls(
            device.key,
            False,
            {dtype: rate for dtype, rate in rates.items() if rate},
            device.memory_gbps,
            "stated, not measured: "
            + ("figures of the datasheet, dense" if device.is_cuda else
               "cores times what their instructions allow at 3 GHz, and 20 GB/s a core"),
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Ceilings:
        """Read a file that benchmarks/ceilings.py wrote.

        Raises:
            InvalidInput: it cannot be read, or is not such a file.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"its schema_version is {data['schema_version']}")
            rates = {str(dtype): float(rate) for dtype, rate in data["tflops"].items()}
            memory = float(data["memory_gbps"])
            if not all(rate > 0 for rate in (memory, *rates.values())):
                raise ValueError("a rate is not greater than 0")
            device = Device.from_dict(data["device"])
            origin = f"measured {data['date'][:10]}: {data['how']}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise InvalidInput(
                f"--ceilings {path} is not what benchmarks/ceilings.py writes, schema_version "
                f"{SCHEMA_VERSION} ({said}); measure them with that script, or leave the option "
                "away and the stated ceilings are shown."
            ) from None
        return cls(device.key, True, rates, memory, origin)

    def attainable_tflops(self, dtype: str, intensity: float) -> float | None:
        """The most for so many operations per byte; None where no rate of that dtype is known."""
        rate = self.tflops.get(dtype)
        if not rate or not self.memory_gbps:
            return None
        return min(rate, intensity * self.memory_gbps / 1e3)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "measured": self.measured,
            "tflops": dict(self.tflops),
            "memory_gbps": self.memory_gbps,
            "origin": self.origin,
        }
