"""Can a device run the kernels of this package, and what launches one? Files are checked first."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from ._table import HERE, table

Tensors = Sequence["torch.Tensor | None"]
Launch = Callable[[Tensors, float], None]
"""launch((q, k, v, out, lse, and the descales of an op that has them), softmax_scale), on the
device that is current. It checks nothing."""
Bind = Callable[[Sequence[float]], Launch]
"""Sizes, strides and the cap -> what launches a kernel for them."""


class NoLibrary(RuntimeError):
    """A kernel has no library that this machine can load: another kernel, or PyTorch, serves."""


def refusal(device: torch.device) -> str | None:
    """Why the kernels of this package cannot run on a device, or None."""
    return _refusal(device.type, device.index or 0)


@cache
def _refusal(kind: str, index: int) -> str | None:
    wanted = table()["header"]["device"]
    what = f"the kernels are for {wanted['name']} ({wanted['arch']})"
    if kind == "cpu" and wanted["arch"] == "cpu":
        missing = set(wanted["isa"]) - _cpu_flags()
        return f"{what}, and this CPU lacks {', '.join(sorted(missing))}" if missing else None
    if kind == "cpu" and interpreting():
        return None
    if kind != "cuda" or wanted["arch"] == "cpu":
        return f"{what}, not for {kind}"
    found = torch.cuda.get_device_properties(index)
    arch = f"sm{found.major}{found.minor}"
    if arch != wanted["arch"]:
        return f"{what}, and {found.name} is {arch}"
    if (found.name, found.multi_processor_count) != (wanted["name"], wanted["num_sms"]):
        warnings.warn(
            f"{__package__} was tuned on {wanted['name']} with {wanted['num_sms']} SMs. Its "
            f"kernels run on {found.name} with {found.multi_processor_count}; others may be "
            "faster there.",
            stacklevel=2,
        )
    return None


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1), on a CPU."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@cache
def prepare(name: str, index: int) -> Bind:
    """What binds sizes and strides to a kernel, on the CUDA device `index` (0 on a CPU).

    Raises:
        NoLibrary: there is none, or not for this machine; the message says how it is made.
        RuntimeError: a file is not the one that was exported.
    """
    if table()["kernels"][name]["language"] == "python":
        from ._triton import load
    else:
        from ._library import load
    return load(name, index)


def content(file: str, sha256: str) -> bytes:
    """What a file of kernels/ holds, if that is what was exported."""
    path = HERE / "kernels" / file
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RuntimeError(
            f"{path} is not what was exported: its sha256 is not {sha256}. It is not run; install "
            "the package again."
        )
    return data


def stream(index: int) -> int:
    """The current stream of a device, as a launch takes it; the public call makes an object."""
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    return handle


def memory(num_bytes: int, index: int) -> torch.Tensor:
    """For one launch: torch's allocator knows streams and CUDA graphs, and may reuse it then."""
    cpu = table()["header"]["device"]["arch"] == "cpu" or interpreting()
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu" if cpu else f"cuda:{index}")


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor lies; 0 for one that is not wanted."""
    return 0 if tensor is None else tensor.data_ptr()
