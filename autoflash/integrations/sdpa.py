"""Which calls of F.scaled_dot_product_attention can autoflash serve, and how do they reach it?

PyTorch's name is replaced while a context is open, as its own context parallelism does it. A
TorchFunctionMode would see every call of PyTorch, at 1.1 us each (view: 0.7 -> 1.8 us, Zen 4), and
yet not those inside nn.MultiheadAttention, whose body runs with the mode switched off.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.backends import mha
from torch.compiler import is_compiling

from autoflash.runtime.attention import attention

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(eq=False)
class Routed:
    """What became of the calls of F.scaled_dot_product_attention in a context.

    Calls of the thread that opened it, in eager mode: code that torch.compile made does not count.

    Attributes:
        served: by autoflash.attention.
        left: to PyTorch, by reason.
    """

    served: int = 0
    left: Counter[str] = field(default_factory=Counter)


class _Here(threading.local):
    """The contexts that this thread has open, outermost first.

    Attributes:
        contexts: a context counts the calls of those within it too.
        active: whether there are any; what torch.compile traces reads no more than this.
    """

    def __init__(self) -> None:
        # Not as defaults of the class: torch.compile would read those, from Python 3.12 on.
        self.contexts: tuple[Routed, ...] = ()
        self.active = False


_here = _Here()
_lock = threading.Lock()
_open = 0  # contexts, of all threads
_original: Callable[..., Tensor] = F.scaled_dot_product_attention
_covered = False  # someone replaced `_routed` in turn, and may go on calling it
_fastpath = True


@contextmanager
def route_sdpa() -> Iterator[Routed]:
    """Serve F.scaled_dot_product_attention by autoflash, for the calls that it can serve.

        with torch.inference_mode(), route_sdpa() as routed:
            model(x)
        print(routed.served, routed.left)

    Results are those of PyTorch within rounding. These calls stay PyTorch's: with attn_mask,
    dropout or gradients, of nested tensors or subclasses, of dtypes other than float16, bfloat16
    and float32, and of shapes that only broadcasting makes fit. Causal masks are PyTorch's,
    aligned top-left. The fast path of nn.TransformerEncoder and nn.MultiheadAttention, which calls
    no F.scaled_dot_product_attention, is off while a context is open.

    Contexts may be nested, and be open in several threads: a call is routed in the threads that
    have one open. It also works as a decorator.

    Returns:
        A context manager that gives Routed, which counts.

    Source:
        torch.distributed.tensor.experimental.context_parallel, which replaces the same name.
    """
    routed = Routed()
    _enter()
    _here.contexts, _here.active = (*_here.contexts, routed), True
    try:
        yield routed
    finally:
        # Coroutines and generators may close them in another order than they opened them in.
        rest = tuple(context for context in _here.contexts if context is not routed)
        _here.contexts, _here.active = rest, bool(rest)
        _leave()


def _enter() -> None:
    """Put `_routed` in place, for the first context of the process."""
    global _open, _original, _covered, _fastpath
    with _lock:
        _open += 1
        if _open > 1:
            return
        if not _covered or F.scaled_dot_product_attention is _original:
            _original, _covered = F.scaled_dot_product_attention, False
            F.scaled_dot_product_attention = _routed  # type: ignore[assignment] # scale is by keyword
        _fastpath = mha.get_fastpath_enabled()
        mha.set_fastpath_enabled(False)


def _leave() -> None:
    global _open, _covered
    with _lock:
        _open -= 1
        if _open > 0:
            return
        _covered = F.scaled_dot_product_attention is not _routed
        if not _covered:
            F.scaled_dot_product_attention = _original
        mha.set_fastpath_enabled(_fastpath)


@wraps(_original)
def _routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What stands for F.scaled_dot_product_attention while a context is open in any thread."""
    reason: str | None = "no context in this thread"
    if _here.active:
        reason = _refusal(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
        if not is_compiling():  # a number that changes would be compiled anew with each change
            _count(reason)
    if reason is None:
        return _serve(query, key, value, is_causal, scale)
    return _original(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _count(reason: str | None) -> None:
    for routed in _here.contexts:
        if reason is None:
            routed.served += 1
        else:
            routed.left[reason] += 1


def _refusal(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: object,
    dropout_p: float,
    scale: object,
    enable_gqa: bool,
) -> str | None:
    """Why a call stays PyTorch's, mistakes included; None if autoflash serves it."""
    if attn_mask is not None:
        return "attn_mask"
    if dropout_p != 0.0:
        return "dropout_p"
    if scale is not None and not isinstance(scale, (float, int)):
        return "scale"
    given = (query, key, value)
    for tensor in given:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested:
            return "nested tensor or subclass"
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return "gradients"
    if not is_compiling() and (
        forward_ad._current_level != -1 or torch._C._get_tracing_state() is not None
    ):
        return "gradients or tracing"
    if query.device.type not in ("cpu", "cuda") or not query.device == key.device == value.device:
        return "device"
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return "dtype"
    if _misfit(query.shape, key.shape, value.shape, enable_gqa):
        return "shapes"
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        return "strides"
    return None


def _misfit(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool) -> bool:
    """Whether three shapes (..., num_heads, seqlen, head_dim) are no plain call of attention.

    Such a call is a mistake, over no elements, or broadcasts.
    """
    if not 2 <= len(q) == len(k) == len(v) or 0 in (*q, *k, *v):
        return True
    if q[-1] != k[-1] or k[-2] != v[-2] or q[:-3] != k[:-3] or k[:-2] != v[:-2]:
        return True
    heads, kv_heads = (q[-3], k[-3]) if len(q) > 2 else (1, 1)
    return heads != kv_heads and not (enable_gqa and heads % kv_heads == 0)


def _serve(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """A call that nothing speaks against, of any number of dimensions from two."""
    shape = (*q.shape[:-1], v.shape[-1])
    if q.dim() != 4:
        q, k, v = _with_four(q), _with_four(k), _with_four(v)
    window = None
    if is_causal:
        # Top-left, row i sees keys up to i: of more keys than rows the last are seen by none, and
        # where there are more rows, i is where autoflash's diagonal is, plus the difference.
        rows, keys = q.shape[2], k.shape[2]
        if rows < keys:
            k, v = k[:, :, :rows], v[:, :, :rows]
        elif rows > keys:
            is_causal, window = False, (None, rows - keys)
    # As PyTorch's kernels do: what was (batch, seqlen, ...) in memory is so again, and the caller's
    # transposing and reshaping of it copies nothing.
    by_rows = q.stride(1) < q.stride(2)
    if by_rows:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    layout = "bshd" if by_rows else "bhsd"
    out = attention(
        q, k, v, causal=is_causal, window_size=window, softmax_scale=scale, layout=layout
    )
    assert isinstance(out, Tensor)
    if by_rows:
        out = out.transpose(1, 2)
    return out if out.shape == shape else out.view(shape)


def _with_four(x: Tensor) -> Tensor:
    """(batch, num_heads, seqlen, head_dim) of fewer or more dimensions."""
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x[(None,) * (4 - x.dim())]
