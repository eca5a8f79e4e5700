"""How does PyTorch's registry of flash attentions get autoflash as one of its implementations?

The registry (torch.nn.attention.*_flash_attention_impl, since PyTorch 2.11) lets an implementation
replace kernels of aten operators. Ours replaces one, _scaled_dot_product_flash_attention on CUDA,
which F.scaled_dot_product_attention calls where it chooses flash attention. Its backward pass stays
PyTorch's: that takes the output and the lse of ours, which have its definition (natural logarithm).
_flash_attention_forward (packed sequences, nested tensors) is not replaced, and is what serves here
whatever autoflash does not.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import register_flash_attention_impl

from autoflash.errors import InvalidInput
from autoflash.runtime import request, serving

OPERATOR = "_scaled_dot_product_flash_attention"

Output = tuple[Any, ...]
"""(out, lse, no cu_seqlens twice, seqlen_q, seqlen_k, seed and offset of dropout, debug mask)"""


def register_torch(name: str = "autoflash") -> str:
    """Offer autoflash as a flash attention of PyTorch; nothing changes until it is activated.

        register_torch()
        torch.nn.attention.activate_flash_attention_impl("autoflash")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            model(x)
        torch.nn.attention.restore_flash_attention_impl()

    Then it serves F.scaled_dot_product_attention of CUDA tensors where PyTorch chooses flash
    attention, with gradients and without; dropout, what no kernel of autoflash takes, packed
    sequences and nested tensors are left to PyTorch's own flash attention.

    Args:
        name: in the registry.

    Returns:
        The name.

    Source:
        torch.nn.attention._registry, which says what an implementation has to be.
    """
    register_flash_attention_impl(name, register_fn=activate)
    return name


class Handle:
    """An activated implementation; the kernel that it replaced is back after `remove`."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        """Take the kernel out of PyTorch's dispatcher: it goes when its Library does."""
        self._library = None


def activate(dispatch_key: str = "CUDA") -> Handle:
    """Put our kernel into PyTorch's dispatcher; the registry calls it."""
    library = Library("aten", "IMPL", dispatch_key)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # That a kernel is replaced is what was asked for.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl(OPERATOR, _Forward(), dispatch_key)  # type: ignore[no-untyped-call]
    return Handle(library)


class _Forward:
    """The kernel, with what it has found out about the calls of each kind."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[object, ...], str | None] = {}
        self._here = threading.local()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Output:
        """Arguments and results of aten::_scaled_dot_product_flash_attention.

        query is (batch, num_heads, seqlen_q, head_dim), key and value have seqlen_k rows and
        perhaps fewer heads; out has the strides of query, as PyTorch's compiler takes for granted.
        """
        layout = None
        # What PyTorch serves for autoflash, because a launch failed, comes here once more.
        if not dropout_p and not return_debug_mask and not getattr(self._here, "serving", False):
            layout = self._layout(query, key, value, is_causal)
        if layout is None:
            return _by_torch(query, key, value, dropout_p, is_causal, return_debug_mask, scale)
        q, k, v = query, key, value
        if layout != "bhsd":
            q, k, v = _given(q, layout), _given(k, layout), _given(v, layout)
        self._here.serving = True
        try:
            out, lse = serving.call(
                q, k, v, is_causal, None, 0.0, scale, None, True, _TAKEN[layout]
            )
        finally:
            self._here.serving = False
        if layout == "bshd":
            out = out.transpose(1, 2)
        elif layout == "sbhd":
            out = out.view(query.shape[2], *query.shape[:2], query.shape[3]).permute(1, 2, 0, 3)
            lse = lse.view(query.shape[:3])
        # Without dropout nobody reads the seed and the offset, here as in PyTorch's own.
        seed = torch.empty(2, dtype=torch.uint64, device=query.device)
        offset = torch.empty((), dtype=torch.uint64, device=query.device)
        no_mask = query.new_empty(0)
        return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, no_mask

    def _layout(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> str | None:
        """In which layout a kernel of ours serves such a call; None leaves it to PyTorch."""
        address = query.data_ptr() | key.data_ptr() | value.data_ptr()
        kind = (
            query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
            query.dtype, key.dtype, value.dtype, query.device, is_causal, address & 15,
        )  # fmt: skip
        if kind in self._layouts:
            return self._layouts[kind]
        capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
        layout = _find_layout(query, key, value, is_causal, may_build=not capturing)
        if not capturing:  # what cannot be built during a capture may be built later
            if len(self._layouts) >= serving.MOST_CALLS:
                self._layouts.clear()
            self._layouts[kind] = layout
        return layout


def _find_layout(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, *, may_build: bool
) -> str | None:
    if query.dim() != 4 or 0 in query.shape or 0 in key.shape:
        return None
    if is_causal and query.shape[2] > key.shape[2]:
        return None  # rows that see no key: PyTorch's lse of them is inf, and its backward needs it
    if value.shape[3] != query.shape[3]:
        return None
    layout = next((each for each in _ORDERS if _fits(each, query, key, value)), None)
    if layout is None:
        return None
    q, k, v = (_given(x, layout) for x in (query, key, value))
    try:
        request.check(q, k, v, causal=is_causal, layout=_TAKEN[layout])
    except InvalidInput:
        return None  # PyTorch has words of its own for it
    if request.no_kernel_for(q) is not None:
        return None
    problem = request.problem_of(q, k, v, causal=is_causal, layout=_TAKEN[layout])
    dispatcher = serving.dispatcher(q.device.type, q.device.index)
    served = dispatcher.serve(problem, may_build=may_build)
    return layout if served.kernel is not None else None


_ORDERS = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}
"""How (batch, num_heads, seqlen, head_dim) may lie in memory, outermost first.

nn.MultiheadAttention makes the last one. A kernel sees that as one sequence of batch * num_heads
heads: the head of K and V that a head attends to is the same.
"""
_TAKEN = {"bhsd": "bhsd", "bshd": "bshd", "sbhd": "bshd"}
"""The layout in which a kernel takes what `_given` makes."""


def _given(x: Tensor, layout: str) -> Tensor:
    """(batch, num_heads, seqlen, head_dim) as a kernel is given it; copies nothing if `_fits`."""
    if layout == "bhsd":
        return x
    x = x.permute(_ORDERS[layout])
    return x if layout == "bshd" else x.flatten(1, 2).unsqueeze(0)


def _fits(layout: str, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel that is given q, k and v so makes an output with the strides wanted."""
    order, shape = _ORDERS[layout], query.shape
    wanted = torch.empty_like(query, device="meta").stride()
    made = torch.empty([shape[axis] for axis in order], device="meta").stride()
    # Strides of a single row, head or batch place nothing.
    if any(
        wanted[axis] != stride for axis, stride in zip(order, made, strict=True) if shape[axis] > 1
    ):
        return False
    return layout != "sbhd" or all(
        1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1) for x in (query, key, value)
    )


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> Output:
    """What the replaced kernel does: to call this operator, in another layout."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    out, lse, seed, offset, mask = torch.ops.aten._flash_attention_forward.default(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        None, None, seqlen_q, seqlen_k, dropout_p, is_causal, return_debug_mask, scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), lse, None, None, seqlen_q, seqlen_k, seed, offset, mask
