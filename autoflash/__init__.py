"""autoflash: a code-generating kernel autotuner for flash attention.

Everything is imported when it is first used: `import autoflash` alone loads neither PyTorch nor
any other dependency.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoflash.config import Config
    from autoflash.device import Device
    from autoflash.errors import AutoflashError, BuildError, InvalidInput, UnsupportedProblem
    from autoflash.problem import Problem
    from autoflash.record import Record
    from autoflash.runtime.attention import attention
    from autoflash.runtime.explain import explain
    from autoflash.runtime.warmup import warmup

__version__ = "0.1.0"

_HOME = {
    "AutoflashError": "autoflash.errors",
    "BuildError": "autoflash.errors",
    "Config": "autoflash.config",
    "Device": "autoflash.device",
    "InvalidInput": "autoflash.errors",
    "Problem": "autoflash.problem",
    "Record": "autoflash.record",
    "UnsupportedProblem": "autoflash.errors",
    "attention": "autoflash.runtime.attention",
    "explain": "autoflash.runtime.explain",
    "warmup": "autoflash.runtime.warmup",
}

__all__ = [
    "AutoflashError",
    "BuildError",
    "Config",
    "Device",
    "InvalidInput",
    "Problem",
    "Record",
    "UnsupportedProblem",
    "__version__",
    "attention",
    "explain",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autoflash' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
