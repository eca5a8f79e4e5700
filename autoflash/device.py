"""Device: where kernels run. Real ones are read off; one fixed one exists for every known arch.

The fixed ones let anything be planned and compiled without the hardware. Their figures are those
of the vendor's datasheets and architecture whitepapers for the part named.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from autoflash.errors import InvalidInput, UnknownName


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The facts about a device that kernels, constraints and the static model read.

    Attributes:
        name: the marketing name, as PyTorch reports it.
        arch: "sm80" and the like, or "cpu".
        num_sms: streaming multiprocessors; cores this process may use, on a CPU.
        smem_bytes_per_block: most shared memory one thread block may have (opt-in limit).
        smem_bytes_per_sm: shared memory of one multiprocessor.
        registers_per_sm: 32-bit registers of one multiprocessor.
        threads_per_sm: most resident threads of one multiprocessor.
        l2_bytes: last-level cache (L3 on a CPU).
        memory_gbps: peak memory bandwidth in GB/s.
        clock_ghz: boost clock.
        tflops_16bit: dense fp16/bf16 matrix rate with float32 accumulation.
        tflops_fp32: rate of float32 products (tf32 is not counted: it is not float32).
        isa: instruction-set extensions that C++ templates may use (CPU only).
    """

    name: str
    arch: str
    num_sms: int
    smem_bytes_per_block: int = 0
    smem_bytes_per_sm: int = 0
    registers_per_sm: int = 0
    threads_per_sm: int = 0
    l2_bytes: int = 0
    memory_gbps: float = 0.0
    clock_ghz: float = 0.0
    tflops_16bit: float = 0.0
    tflops_fp32: float = 0.0
    isa: tuple[str, ...] = ()

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA GPU."""
        return self.arch.startswith("sm")

    @property
    def capability(self) -> int:
        """Compute capability times ten (90 for sm90); 0 on a CPU."""
        return int(self.arch[2:]) if self.is_cuda else 0

    @property
    def slug(self) -> str:
        """The name as a file name: "nvidia-h200"."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def key(self) -> str:
        """What must agree for a measured record to apply: name, arch and SM count.

        Never the arch alone: H100, H200 and H20 are all sm90 and have different winners.
        """
        isa = f":{'+'.join(self.isa)}" if self.isa else ""
        return f"{self.slug}:{self.arch}:{self.num_sms}{isa}"

    def rounds(self, tiles: int) -> int:
        """In how many rounds the multiprocessors take so many tiles, one each at a time."""
        return -(-tiles // self.num_sms)

    def tflops_peak(self, dtype: str) -> float:
        """The matrix rate for a dtype, in TFLOPS; 0 where there is no such instruction."""
        if dtype == "float32":
            return self.tflops_fp32
        if dtype.startswith("float8"):  # twice that of 16 bits on every arch that has it
            return 2 * self.tflops_16bit if self.capability >= 89 else 0.0
        return self.tflops_16bit

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        data = dataclasses.asdict(self)
        data["isa"] = list(self.isa)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Device:
        """Inverse of `to_dict`."""
        return cls(**{**data, "isa": tuple(data.get("isa", ()))})


def _gpu(
    name: str,
    arch: str,
    num_sms: int,
    smem_kib: int,
    smem_sm_kib: int,
    threads: int,
    l2_mib: int,
    gbps: float,
    ghz: float,
    tflops_16bit: float,
    tflops_fp32: float,
) -> Device:
    return Device(
        name=name, arch=arch, num_sms=num_sms, smem_bytes_per_block=smem_kib * 1024,
        smem_bytes_per_sm=smem_sm_kib * 1024, registers_per_sm=65536, threads_per_sm=threads,
        l2_bytes=l2_mib << 20, memory_gbps=gbps, clock_ghz=ghz, tflops_16bit=tflops_16bit,
        tflops_fp32=tflops_fp32,
    )  # fmt: skip


# Shared memory limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability". The rest: the datasheet of the part.
KNOWN_GPUS = {
    gpu.arch: gpu
    for gpu in (
        _gpu("NVIDIA A100-SXM4-80GB", "sm80", 108, 163, 164, 2048, 40, 2039, 1.41, 312, 19.5),
        _gpu("NVIDIA GeForce RTX 3090", "sm86", 82, 99, 100, 1536, 6, 936, 1.70, 71, 35.6),
        _gpu("NVIDIA GeForce RTX 4090", "sm89", 128, 99, 100, 1536, 72, 1008, 2.52, 165, 82.6),
        _gpu("NVIDIA H100 80GB HBM3", "sm90", 132, 227, 228, 2048, 50, 3350, 1.83, 989, 66.9),
        _gpu("NVIDIA B200", "sm100", 148, 227, 228, 2048, 126, 8000, 1.85, 2250, 75.0),
        _gpu("NVIDIA GeForce RTX 5090", "sm120", 170, 99, 100, 1536, 96, 1792, 2.41, 210, 104.8),
    )
}
ARCHES = (*KNOWN_GPUS, "cpu", "native")
"""What `--arch` takes; "native" is the device found here."""

_MEMORY_GBPS = {"NVIDIA H200": 4800.0}
"""Peak bandwidth of parts that share an arch with the fixed device but not its memory."""


def for_arch(arch: str) -> Device:
    """The device that `--arch` names: the one present if it is of that arch, else the fixed one.

    Raises:
        UnknownName: `arch` is not one of ARCHES.
    """
    if arch == "native":
        return native()
    if arch == "cpu":
        return _cpu()
    if arch not in KNOWN_GPUS:
        raise UnknownName.of("arch", arch, ARCHES)
    here = native()
    return here if here.arch == arch else KNOWN_GPUS[arch]


def native() -> Device:
    """The device found here: the first CUDA device, else the CPU."""
    import torch

    return _gpu_at(0) if torch.cuda.is_available() else _cpu()


def of_tensor(device_type: str, index: int | None) -> Device:
    """The device a tensor lies on.

    Args:
        device_type: tensor.device.type.
        index: tensor.device.index.

    Raises:
        InvalidInput: the type is neither "cpu" nor "cuda".
    """
    if device_type == "cpu":
        return _cpu()
    if device_type == "cuda":
        return _gpu_at(index or 0)
    raise InvalidInput(
        f"tensors are on device type {device_type!r}; autoflash has kernels for 'cuda' and 'cpu'."
    )


@cache
def _gpu_at(index: int) -> Device:
    import torch

    props = torch.cuda.get_device_properties(index)
    arch = f"sm{props.major}{props.minor}"
    # The nearest known arch below supplies what the driver does not report.
    known = [gpu for gpu in KNOWN_GPUS.values() if gpu.capability <= props.major * 10 + props.minor]
    like = max(known, key=lambda gpu: gpu.capability, default=KNOWN_GPUS["sm80"])
    scale = props.multi_processor_count / like.num_sms
    return dataclasses.replace(
        like,
        name=props.name,
        arch=arch,
        num_sms=props.multi_processor_count,
        # PyTorch's own type information lacks this one.
        smem_bytes_per_block=getattr(
            props, "shared_memory_per_block_optin", like.smem_bytes_per_block
        ),
        smem_bytes_per_sm=props.shared_memory_per_multiprocessor,
        registers_per_sm=like.registers_per_sm,  # 65536 on every arch since Maxwell
        threads_per_sm=props.max_threads_per_multi_processor,
        l2_bytes=props.L2_cache_size,
        memory_gbps=_MEMORY_GBPS.get(props.name, like.memory_gbps),
        tflops_16bit=like.tflops_16bit * scale,
        tflops_fp32=like.tflops_fp32 * scale,
    )


_CPU_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")


@cache
def _cpu() -> Device:
    name, flags, l3_bytes = _read_cpuinfo(Path("/proc/cpuinfo"))
    isa = tuple(flag for flag in _CPU_ISA if flag in flags)
    cores = len(os.sched_getaffinity(0))
    # Two FMA pipes of 256 bits per core (or one of 512), both counted as 2 * lanes operations.
    lanes_per_cycle = 16 if "avx2" in isa else 4
    ghz = 3.0
    fp32 = cores * lanes_per_cycle * 2 * ghz / 1e3
    return Device(
        name=name,
        arch="cpu",
        num_sms=cores,
        l2_bytes=l3_bytes,
        memory_gbps=20.0 * cores,
        clock_ghz=ghz,
        tflops_16bit=fp32 * (2 if "avx512_bf16" in isa else 1),
        tflops_fp32=fp32,
        isa=isa,
    )


def _read_cpuinfo(path: Path) -> tuple[str, frozenset[str], int]:
    """Model name, flags and last-level cache bytes of the first processor in /proc/cpuinfo."""
    import platform

    fields: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            if not line.strip():
                break
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    kib = fields.get("cache size", "0 KB").split()[0]
    name = fields.get("model name") or platform.processor() or platform.machine() or "cpu"
    return name, frozenset(fields.get("flags", "").split()), int(kib) * 1024
