"""Triton's interpreter as tests need it, in processes that have no autoflash."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let scalars be loop bounds under NumPy 2.4, as Triton does itself from 3.8 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    interpreter._patch_lang_tensor = mended
