"""With which versions, on which machine, was something measured?"""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from typing import Any

import autoflash
from autoflash import settings
from autoflash.device import Device
from autoflash.tuning.boards import short
from autoflash.tuning.telemetry import Telemetry

_PEER_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl")


def environment(device: Device) -> dict[str, Any]:
    """Versions of all that takes part in a measurement on `device`; JSON-ready.

    Args:
        device: a GPU that is present adds board, driver, CUDA and cuDNN; a CPU adds
            compiler and threads.
    """
    facts = _versions(device)
    if not device.is_cuda:
        import torch

        facts = {**facts, "threads": torch.get_num_threads()}  # may change while a process runs
    return facts


@cache
def _versions(device: Device) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "autoflash": autoflash.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": device.name,
        "os": f"{platform.system()} {platform.machine()}",
    }
    if device.is_cuda:
        facts["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            cudnn: Any = torch.backends.cudnn  # no types published
            facts["cudnn"] = cudnn.version()
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            uuid = str(getattr(properties, "uuid", ""))
            facts["driver"] = Telemetry(uuid or None).driver
            facts["board"] = short(uuid) or None  # those of a kind are not of one speed
        facts.update({name: _version(name) for name in _PEER_PACKAGES})
    else:
        facts["cxx"] = _compiler(settings.get().cxx)
        facts["isa"] = " ".join(device.isa)
    return {name: value for name, value in facts.items() if value is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler(command: str) -> str | None:
    """First line of the compiler's own version text; None where there is no compiler."""
    try:
        said = subprocess.run(
            [command, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.partition("\n")[0].strip() or None
