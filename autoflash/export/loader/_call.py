"""What does a call ask for? Its arguments checked, and the problem that they make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._table import Problem

Window = tuple[int | None, int | None]
Descales = tuple[Tensor | None, Tensor | None, Tensor | None]

FP8 = torch.float8_e4m3fn
AXES = {"bshd": (0, 1, 2), "bhsd": (0, 2, 1)}
"""Layout -> where batch, rows and heads are in a shape."""
SMALLEST_SCALE, LARGEST = 2.0**-126, 3.4e38
"""What float32 holds of scales and caps."""


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: Any,
    softcap: float,
    descales: Descales,
    layout: str,
) -> tuple[Window, float]:
    """Refuse what cannot be meant; window and softcap as kernels take them."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, layout {layout!r}"
    if layout not in AXES:
        raise ValueError(f"layout={layout!r}: 'bshd' or 'bhsd' is needed.")
    b, s, h = AXES[layout]
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"four dimensions each are needed: {shapes}.")
    fit = q.shape[b] == k.shape[b] == v.shape[b] and q.shape[3] == k.shape[3]
    if not fit or (k.shape[s], k.shape[h]) != (v.shape[s], v.shape[h]) or 0 in (
        k.shape[h], q.shape[3], v.shape[3]
    ):  # fmt: skip
        raise ValueError(f"these shapes do not make an attention call: {shapes}.")
    if q.shape[h] % k.shape[h]:
        raise ValueError(f"query heads must be a multiple of key/value heads: {shapes}.")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q, k and v must share dtype and device: {q.dtype}, {k.dtype}, {v.dtype} on "
            f"{q.device}, {k.device}, {v.device}."
        )
    if any(tensor.shape[3] > 1 and tensor.stride(3) != 1 for tensor in (q, k, v)):
        raise ValueError("rows of head_dim must be contiguous (last stride 1): .contiguous().")
    for name, descale in zip(("q_descale", "k_descale", "v_descale"), descales, strict=True):
        wanted = (k.shape[b], k.shape[h])
        if descale is not None and (
            q.dtype != FP8
            or descale.dtype != torch.float32
            or tuple(descale.shape) != wanted
            or descale.device != q.device
        ):
            raise ValueError(
                f"{name}: float32 of shape (batch, num_kv_heads) = {wanted} on {q.device} is "
                f"needed, and q, k and v of {FP8}; it is {descale.dtype} {tuple(descale.shape)} on "
                f"{descale.device}, and q {q.dtype}."
            )
    left, right = (None, None) if window_size is None else window_size
    bounds = [None if bound in (None, -1) else bound for bound in (left, right)]
    for bound in bounds:
        if bound is not None and not (isinstance(bound, int) and bound >= 0):
            raise ValueError(f"window_size={window_size!r}: whole numbers from 0 up, None or -1.")
    if softcap != 0 and not SMALLEST_SCALE <= softcap <= LARGEST:
        raise ValueError(f"softcap={softcap!r}: 0.0 or a positive float32 is needed.")
    return (bounds[0], bounds[1]), float(softcap)


def problem_of(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: Window, softcap: float, layout: str
) -> Problem:
    """What the table is asked for."""
    b, s, h = AXES[layout]
    size = 2 if q.dtype == FP8 else q.element_size()  # of the output's elements
    aligned = v.shape[3] * size % 16 == 0 and all(
        tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in (q, k, v)
    )
    return Problem(
        op="fwd_fp8" if q.dtype == FP8 else "fwd",
        dtype=str(q.dtype).removeprefix("torch."),
        batch=q.shape[b], seqlen_q=q.shape[s], seqlen_k=k.shape[s],
        num_heads=q.shape[h], num_kv_heads=k.shape[h],
        head_dim=q.shape[3], head_dim_v=v.shape[3],
        causal=causal, window_left=window[0], window_right=window[1],
        softcap=softcap, aligned=aligned,
    ).settled()  # fmt: skip


def out_dtype(q: Tensor) -> torch.dtype:
    """Of the output: 8 bits give bfloat16."""
    return torch.bfloat16 if q.dtype == FP8 else q.dtype
