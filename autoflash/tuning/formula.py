"""What is attention, exactly and by the formula?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autoflash.tuning.inputs import bshd

if TYPE_CHECKING:
    import torch

_SCORES_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Most memory for scores at once."""


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    layout: str = "bshd",
    descales: Sequence[torch.Tensor | None] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64, in chunks, so that memory stays bounded at any length.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim) for layout "bshd".
        k: (batch, seqlen_k, num_kv_heads, head_dim).
        v: (batch, seqlen_k, num_kv_heads, head_dim_v).
        causal: aligned bottom-right.
        window_left: as in Problem; None is unbounded.
        window_right: likewise.
        softcap: as in Problem; 0 is off.
        softmax_scale: None means 1 / sqrt(head_dim).
        layout: "bshd" or "bhsd", of q, k, v and of the output.
        descales: factors of q, k and v, (batch, num_kv_heads) each; None among them, or none: 1.

    Returns:
        out, float64, in `layout`; lse, float64, (batch, num_heads, seqlen_q), natural logarithm.
        Rows with no visible key give out 0 and lse -inf.
    """
    import torch

    q, k, v = (bshd(tensor, layout) for tensor in (q, k, v))
    q, k, v = descaled((q, k, v), descales, torch.float64)
    batch, seqlen_q, heads, head_dim = q.shape
    scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(head_dim)
    out = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=torch.float64, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float64, device=q.device)
    rows = torch.arange(seqlen_q, device=q.device)
    seen = visible(rows, seqlen_q, k.shape[1], causal, window_left, window_right)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            head = q[b, :, h], k[b, :, kv], v[b, :, kv]
            out[b, :, h], lse[b, h] = exact_rows(*head, seen, scale, softcap)
    return bshd(out, layout), lse


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The formula in PyTorch operations in the inputs' own dtype: what a fused kernel replaces.

    Args:
        q: (batch, num_heads, seqlen_q, head_dim).
        k: (batch, num_kv_heads, seqlen_k, head_dim).
        v: (batch, num_kv_heads, seqlen_k, head_dim_v).
        causal: aligned bottom-right.
        softmax_scale: folded into k, as in FlashAttention's tests.
        window_left: as in Problem; None is unbounded.
        window_right: likewise.
        softcap: as in Problem; 0 is off.

    Returns:
        out, (batch, num_heads, seqlen_q, head_dim_v).
    """
    import torch

    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ (k * softmax_scale).transpose(-2, -1)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    cut_right = causal or window_right is not None
    if cut_right or window_left is not None:
        rows = torch.arange(q.shape[2], device=q.device)
        seen = visible(rows, q.shape[2], k.shape[2], causal, window_left, window_right)
        scores.masked_fill_(hidden(seen, k.shape[2]), -math.inf)
        if cut_right and q.shape[2] > k.shape[2]:  # rows that see nothing
            empty = seen[:, 0] >= seen[:, 1]
            return (torch.softmax(scores, -1) @ v).masked_fill(empty[:, None], 0.0)
    return torch.softmax(scores, -1) @ v


def visible(
    rows: torch.Tensor,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window_left: int | None = None,
    window_right: int | None = None,
) -> torch.Tensor:
    """What keys the rows see: the first and the one after the last, (rows, 2).

    Args:
        rows: indices of query rows.
        seqlen_q: query rows there are.
        seqlen_k: keys there are.
        causal: a window_right of 0.
        window_left: keys seen before a row's own place; None is all.
        window_right: keys seen after it; None is all.
    """
    import torch

    place = rows + (seqlen_k - seqlen_q)
    right = 0 if causal else window_right
    first, end = torch.zeros_like(place), torch.full_like(place, seqlen_k)
    if window_left is not None:
        first = (place - window_left).clamp(0, seqlen_k)
    if right is not None:
        end = (place + right + 1).clamp(0, seqlen_k)
    return torch.stack((first, end), -1)


def hidden(seen: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """The mask of rows that see what `visible` says: true where a key is not seen."""
    import torch

    keys = torch.arange(seqlen_k, device=seen.device)
    return (keys < seen[:, :1]) | (keys >= seen[:, 1:])


def descaled(
    tensors: Sequence[torch.Tensor], descales: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> list[torch.Tensor]:
    """q, k and v, each (batch, seqlen, heads, dim), times their descales, in `dtype`.

    Args:
        tensors: q, k and v.
        descales: (batch, num_kv_heads) each; None among them, or none given: 1.
        dtype: of the result.
    """
    factors = [*descales, None, None, None]
    made = []
    for tensor, factor in zip(tensors, factors, strict=False):
        if factor is None:
            made.append(tensor.to(dtype))
            continue
        per_head = factor.repeat_interleave(tensor.shape[2] // factor.shape[1], 1)
        wide = tensor.to(dtype if dtype.itemsize > 4 else factor.dtype)
        made.append((wide * per_head[:, None, :, None]).to(dtype))
    return made


def _chunks(rows: int, seqlen_k: int, device_type: str) -> Iterator[slice]:
    step = max(1, _SCORES_BYTES[device_type] // (8 * max(seqlen_k, 1)))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def exact_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact out and lse of the rows (n, head_dim) of one head, in float64."""
    import torch

    k, v = k.double(), v.double()
    outs, lses = [], []
    for part in _chunks(len(q), len(k), k.device.type):
        scores = q[part].double() @ k.T * scale
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(hidden(seen[part], len(k)), -math.inf)
        lse = scores.logsumexp(-1)
        # exp(-inf - -inf) is NaN: rows that see nothing weigh nothing.
        weights = scores.sub_(lse.clamp_min(-1e300)[:, None]).exp_()
        outs.append(weights @ v)
        lses.append(lse)
    if not outs:
        return v.new_empty(0, v.shape[1]), v.new_empty(0)
    return torch.cat(outs), torch.cat(lses)


def low_precision_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    weights_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The rows of one head's out, each result rounded to the inputs' dtype.

    Products run in float32 on operands that are exact in it and are then rounded: what matrix units
    do, and as quick on a CPU that has none for the dtype.

    Args:
        q: (n, head_dim).
        k: (seqlen_k, head_dim).
        v: (seqlen_k, head_dim_v).
        seen: by `visible`.
        scale: folded into k.
        softcap: 0 is off.
        weights_dtype: what the weights are rounded to, if not to that of the inputs; then before
            they are divided by their sum: 8 bits hold no weights of a thousand keys.
    """
    import torch

    dtype = q.dtype
    k, v = (k * scale).float(), v.float()
    outs = []
    for part in _chunks(len(q), len(k), k.device.type):
        scores = (q[part].float() @ k.T).to(dtype)
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        scores = scores.float().masked_fill_(hidden(seen[part], len(k)), -math.inf)
        if weights_dtype is None:
            weights = torch.softmax(scores, -1).nan_to_num_(0.0).to(dtype)
            outs.append((weights.float() @ v).to(dtype))
            continue
        top = scores.amax(-1, keepdim=True) if len(k) else scores.sum(-1, keepdim=True)
        weights = scores.sub_(top.clamp_min(-1e30)).exp_()
        total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
        outs.append((weights.to(weights_dtype).float() @ v / total).to(dtype))
    return torch.cat(outs) if outs else v.new_empty(0, v.shape[1]).to(dtype)


@contextmanager
def no_tf32() -> Iterator[None]:
    """float32 products in float32, whatever this process has allowed."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
