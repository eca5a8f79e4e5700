"""How many compilers may run at once without the machine running out of memory?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from autoflash.device import Device

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def jobs_within_memory(jobs: int, languages: Iterable[str], device: Device) -> int:
    """At most `jobs`, and as many as memory holds of the hungriest compiler; at least 1.

    Args:
        jobs: wanted at once.
        languages: of the sources: only nvcc takes so much that it matters.
        device: what for; nvcc compiles nothing for a CPU.
    """
    if "cuda" not in languages or not device.is_cuda:
        return jobs
    from autoflash.build.cuda import MEMORY_BYTES

    free = available_bytes()
    return jobs if free is None else max(1, min(jobs, free // MEMORY_BYTES))


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Memory that processes may still take here, in a container too; None where nothing says."""
    limits = [
        int(line.split()[1]) * 1024
        for line in _text(meminfo).splitlines()
        if line.startswith("MemAvailable:")
    ]
    most, used = _text(cgroup / "memory.max").strip(), _text(cgroup / "memory.current").strip()
    if most.isdecimal() and used.isdecimal():
        # Files that the kernel cached count as used, and are given up when memory is wanted.
        cached = sum(
            int(line.split()[1])
            for line in _text(cgroup / "memory.stat").splitlines()
            if line.startswith("inactive_file ")
        )
        limits.append(max(0, int(most) - int(used) + cached))
    return min(limits, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
