"""Prepared calls: all that shapes and strides decide is worked out, only addresses are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoflash.build import Kernel
from autoflash.codegen import ops
from autoflash.problem import Problem
from autoflash.runtime import fallback, options, request
from autoflash.runtime.options import Window
from autoflash.runtime.request import UNSCALED, Descales

Result = Tensor | tuple[Tensor, Tensor]
Run = Callable[..., Result]
"""A prepared call: (q, k, v, their addresses, softmax_scale or None, return_lse) -> result.

Of a dtype that has descales, they may follow.
"""

# The public torch.cuda.current_stream builds a Stream object: 2 us more per call.
_raw_stream: Callable[[int], int] = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda index: torch.cuda.current_stream(index).cuda_stream,
)


def kernel_call(
    kernel: Kernel, problem: Problem, q: Tensor, k: Tensor, v: Tensor, layout: str
) -> Run:
    """The launch of a kernel with all that the problem and these tensors' strides decide."""
    b, s, h = ops.LAYOUT_AXES[layout]
    shape = (*q.shape[:3], v.shape[3])
    dtype, float32, device = request.out_dtype(q.dtype), torch.float32, q.device
    made = torch.empty(shape, dtype=dtype, device="meta")
    strides = made.stride()
    batch, seqlen_q, num_heads = q.shape[b], q.shape[s], q.shape[h]
    lse_shape, lse_strides = (batch, num_heads, seqlen_q), (num_heads * seqlen_q, seqlen_q, 1)
    on_device = torch.cuda.device(q.device.index) if q.is_cuda else nullcontext()
    with on_device:  # grids and scratch memory depend on it
        launch = kernel.prepare(ops.fwd_scalars((q, k, v, made), layout, problem))
    default_scale = options.default_scale(q.shape[3])
    last = _last_word(q.device)
    # Of all ways to make a tensor, empty_strided from tuples takes least (1.0 us; empty and
    # new_empty 1.2 to 2.0), and empty_like 0.7, where the strides of q are those wanted.
    empty_strided, empty_like = torch.empty_strided, torch.empty_like
    like = q.shape == shape and q.stride() == strides and q.dtype == dtype

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_address: int,
        k_address: int,
        v_address: int,
        softmax_scale: float | None,
        return_lse: bool,
    ) -> Result:
        out = empty_like(q) if like else empty_strided(shape, strides, dtype=dtype, device=device)
        scale = default_scale if softmax_scale is None else softmax_scale
        if not return_lse:
            launch(q_address, k_address, v_address, out.data_ptr(), 0, scale, last())
            return out
        lse = empty_strided(lse_shape, lse_strides, dtype=float32, device=device)
        addresses = (q_address, k_address, v_address, out.data_ptr(), lse.data_ptr())
        launch(*addresses, scale, last())
        return out, lse

    def run_scaled(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_address: int,
        k_address: int,
        v_address: int,
        softmax_scale: float | None,
        return_lse: bool,
        descales: Descales = UNSCALED,
    ) -> Result:
        out = empty_strided(shape, strides, dtype=dtype, device=device)
        addresses = [q_address, k_address, v_address, out.data_ptr(), 0]
        if return_lse:
            lse = empty_strided(lse_shape, lse_strides, dtype=float32, device=device)
            addresses[4] = lse.data_ptr()
        # Held until the launch; what frees them then gives the memory to the same stream.
        factors = [d if d is None or d.is_contiguous() else d.contiguous() for d in descales]
        addresses += [0 if factor is None else factor.data_ptr() for factor in factors]
        launch(*addresses, default_scale if softmax_scale is None else softmax_scale, last())
        return (out, lse) if return_lse else out

    chosen = run_scaled if problem.op == ops.FWD_FP8.name else run
    if not q.is_cuda or torch.cuda.device_count() == 1:
        return chosen
    return _on_device(chosen, q.device.index)


def _last_word(device: torch.device) -> Callable[[], int]:
    """What gives a launch its last argument: the number of threads, or the current stream."""
    return torch.get_num_threads if device.type == "cpu" else partial(_raw_stream, device.index)


def _on_device(run: Run, index: int) -> Run:
    """`run` with `index` as the current device, to which a launch goes."""

    def run_there(*arguments: Any) -> Result:
        if torch.cuda.current_device() == index:
            return run(*arguments)
        with torch.cuda.device(index):
            return run(*arguments)

    return run_there


def torch_call(q: Tensor, causal: bool, window: Window, softcap: float, layout: str) -> Run:
    """PyTorch's own attention."""
    default_scale = options.default_scale(q.shape[3])

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_address: int,
        k_address: int,
        v_address: int,
        softmax_scale: float | None,
        return_lse: bool,
        descales: Descales = UNSCALED,
    ) -> Result:
        out, lse = fallback.attention(
            q,
            k,
            v,
            causal=causal,
            window=window,
            softcap=softcap,
            softmax_scale=default_scale if softmax_scale is None else softmax_scale,
            descales=descales,
            return_lse=return_lse,
            layout=layout,
        )
        return out if lse is None else (out, lse)

    return run


def empty_call(q: Tensor, v: Tensor, layout: str) -> Run:
    """No rows, or no keys to see: the definition of attention without any arithmetic."""
    b, s, h = ops.LAYOUT_AXES[layout]
    shape = (*q.shape[:3], v.shape[3])
    lse_shape = (q.shape[b], q.shape[h], q.shape[s])
    dtype = request.out_dtype(q.dtype)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_address: int,
        k_address: int,
        v_address: int,
        softmax_scale: float | None,
        return_lse: bool,
        descales: Descales = UNSCALED,
    ) -> Result:
        out = q.new_zeros(shape, dtype=dtype)
        if not return_lse:
            return out
        return out, q.new_full(lse_shape, -math.inf, dtype=torch.float32)

    return run
