"""Where people already call attention: each module registers on demand, and needs its library.

Nothing is imported, patched or registered before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoflash.integrations.flash_impl import register_torch
    from autoflash.integrations.sdpa import route_sdpa
    from autoflash.integrations.transformers import register_transformers

_HOME = {
    "register_torch": "autoflash.integrations.flash_impl",
    "register_transformers": "autoflash.integrations.transformers",
    "route_sdpa": "autoflash.integrations.sdpa",
}

__all__ = ["register_torch", "register_transformers", "route_sdpa"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'autoflash.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
