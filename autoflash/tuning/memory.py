"""Memory: how much does this process hold, on the device or on the host, beyond what PyTorch knows?

A kernel that keeps what it takes passes every other test alone, and starves those beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

from autoflash.device import Device

_STATUS = Path("/proc/self/status")
_THREAD_BYTES = 16 << 20
"""The first parallel region of a process makes its threads, with stacks of 8 MB or so."""
_LEAST_BYTES = 1 << 30


def held_bytes(device: Device) -> int:
    """On a GPU, memory in use that is not PyTorch's; else private memory of this process."""
    if device.is_cuda:
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))


def kept(device: Device, before: int) -> str | None:
    """What was taken and not given back since `held_bytes` was `before`, if that is a leak.

    A GPU's own bookkeeping, such as local memory for a kernel that spills, stays under a sixteenth.
    """
    grown = held_bytes(device) - before
    if device.is_cuda:
        import torch

        limit = max(_LEAST_BYTES, torch.cuda.mem_get_info()[1] // 16)
    else:
        limit = _LEAST_BYTES + _THREAD_BYTES * (os.cpu_count() or 1)
    if grown <= limit:
        return None
    return f"it took {grown / 1e9:.1f} GB of memory and did not give it back"
