"""How fast does the device here multiply and copy at most? Ceilings for `autoflash report`.

python benchmarks/ceilings.py benchmarks/nvidia-h200/ceilings.json

The best of PyTorch's matrix products of a few sizes, for each dtype that it multiplies, and of one
copy between buffers far larger than any cache; timed as kernels are. Under ten seconds on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autoflash import device as devices
from autoflash.device import Device
from autoflash.problem import ELEMENT_SIZES
from autoflash.report.ceilings import SCHEMA_VERSION
from autoflash.tuning.environment import environment
from autoflash.tuning.timing import Timer, policy_for

GPU_SIZES, CPU_SIZES = (4096, 8192, 16384), (1024, 2048)
GPU_COPY, CPU_COPY = 4 << 30, 512 << 20
"""Bytes of each buffer."""
HOW = "largest matrix products of PyTorch at n = {sizes}, one copy of {copy} MiB"


def main() -> int:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="time for each, about")
    options = parser.parse_args()
    found = measure(devices.native(), options.budget_ms)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: found[key] for key in ("tflops", "memory_gbps")}, indent=1))
    return 0


def measure(
    device: Device, budget_ms: float, *, sizes: tuple[int, ...] = (), copy_bytes: int = 0
) -> dict[str, Any]:
    """The document, as Ceilings.load reads it.

    Args:
        device: the one here.
        budget_ms: for each product and the copy.
        sizes: rows of the square matrices; () takes those for the device.
        copy_bytes: of each buffer; 0 likewise.
    """
    import torch

    where = "cuda" if device.is_cuda else "cpu"
    sizes = sizes or (GPU_SIZES if device.is_cuda else CPU_SIZES)
    copy_bytes = copy_bytes or (GPU_COPY if device.is_cuda else CPU_COPY)
    timer = Timer(device)
    rates: dict[str, float] = {}
    for dtype in ELEMENT_SIZES:
        for n in sizes:
            try:
                call = product(dtype, n, where)
                call()
            except (RuntimeError, NotImplementedError, ValueError) as error:
                print(f"{dtype}: not multiplied here ({str(error).splitlines()[0]})")
                break
            us = timer.measure(call, budget_ms=budget_ms).latency_us
            rates[dtype] = max(rates.get(dtype, 0.0), _four(2 * n**3 / us / 1e6))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=where).fill_(1)
    target = torch.empty_like(source)
    us = timer.measure(lambda: target.copy_(source), budget_ms=budget_ms).latency_us
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device.to_dict(),
        "policy": policy_for(device).id,
        "how": HOW.format(sizes=", ".join(map(str, sizes)), copy=copy_bytes >> 20),
        "environment": environment(device),
        "tflops": rates,
        "memory_gbps": _four(2 * copy_bytes / us / 1e3),
    }


def _four(rate: float) -> float:
    """A rate with four significant digits."""
    return float(f"{rate:.4g}")


def product(dtype: str, n: int, where: str) -> Callable[[], object]:
    """A product of two square matrices of random numbers: power, and so clocks, follow the data."""
    import torch

    element = getattr(torch, dtype)
    a, b = (torch.randn(n, n, device=where).to(element) for _ in range(2))
    if dtype.startswith("float8"):
        one = torch.ones((), device=where)
        columns = b.t().contiguous().t()  # the layout that the instruction takes
        return lambda: torch._scaled_mm(a, columns, one, one, out_dtype=torch.bfloat16)
    return lambda: torch.mm(a, b)


if __name__ == "__main__":
    sys.exit(main())
