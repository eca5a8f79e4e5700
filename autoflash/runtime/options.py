"""A call's numbers: window, softcap and scale in the form and range in which kernels take them."""

from __future__ import annotations

import math
import numbers

import torch

from autoflash.errors import InvalidInput

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 3.4028234663852886e38
"""The positive normal range of float32, in which kernels receive softmax_scale and softcap."""

Window = tuple[int | None, int | None]
"""Keys that a query sees to the left and right of its own position; None is all of them."""


def window_of(window_size: object) -> Window:
    """`window_size` as a pair in which None is unbounded.

    Raises:
        InvalidInput: it is not a pair of whole numbers from 0 up, None or -1.
    """
    if window_size is None:
        return None, None
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise InvalidInput(
            f"window_size={_told(window_size)} is not a pair; (left, right) is needed: how many "
            "keys a query sees before and after its own position, each a whole number from 0 up, "
            "or None for all. window_size=None is no window."
        )
    left, right = window_size
    return _bound("left", left), _bound("right", right)


def _bound(side: str, bound: object) -> int | None:
    if bound is None:
        return None
    if isinstance(bound, bool) or not isinstance(bound, numbers.Integral | torch.SymInt):
        raise InvalidInput(
            f"window_size: {side} is {_told(bound)}, a {type(bound).__name__}; a whole number "
            "from 0 up is needed, or None for no bound. A tensor becomes one with .item()."
        )
    if bound < -1:
        raise InvalidInput(
            f"window_size: {side} is {bound}; a whole number from 0 up is needed, or None (or -1) "
            "for no bound."
        )
    if bound == -1:
        return None
    return int(bound)


def softcap_of(softcap: object) -> float:
    """`softcap` as a float.

    Raises:
        InvalidInput: it is not a number, negative, not finite, or beyond float32.
    """
    if isinstance(softcap, bool) or not isinstance(softcap, numbers.Real | torch.SymFloat):
        raise InvalidInput(
            f"softcap={_told(softcap)} is a {type(softcap).__name__}; a float is needed, 0.0 for "
            "none. A tensor becomes one with .item()."
        )
    cap = float(softcap)
    if cap != 0.0 and not SMALLEST_SCALE <= cap <= LARGEST_SCALE:
        raise InvalidInput(
            f"softcap={cap} is neither 0.0 (off) nor a positive float32 from {SMALLEST_SCALE:.3g} "
            f"to {LARGEST_SCALE:.3g}; models use 20 to 50."
        )
    return cap


def scale_of(softmax_scale: object) -> float:
    """`softmax_scale` as a float.

    Raises:
        InvalidInput: it is not a number, not finite, or beyond float32.
    """
    if not isinstance(softmax_scale, numbers.Real):
        raise InvalidInput(
            f"softmax_scale={softmax_scale!r} is a {type(softmax_scale).__name__}; a float is "
            "needed, or None for 1/sqrt(head_dim). A tensor becomes one with .item()."
        )
    scale = float(softmax_scale)
    if not abs(scale) <= LARGEST_SCALE:  # so that NaN, too, is refused, and a symbol is allowed
        raise InvalidInput(
            f"softmax_scale={scale} is not a finite float32; None gives 1/sqrt(head_dim)."
        )
    return scale


def default_scale(head_dim: int) -> float:
    """What softmax_scale=None means."""
    return 1.0 / math.sqrt(head_dim)


def _told(value: object) -> str:
    """An argument in an error message: not all elements of a tensor."""
    if isinstance(value, torch.Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    return repr(value)
