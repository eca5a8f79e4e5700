"""What is attention, exactly and by the formula?"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    softmax_scale: float | None = None,
    layout: str = "bshd",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64, in chunks, so that memory stays bounded at any length.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim) for layout "bshd".
        k: (batch, seqlen_k, num_kv_heads, head_dim).
        v: (batch, seqlen_k, num_kv_heads, head_dim_v).
        causal: aligned bottom-right.
        softmax_scale: None means 1 / sqrt(head_dim).
        layout: "bshd" or "bhsd", of q, k, v and of the output.

    Returns:
        out, float64, in `layout`; lse, float64, (batch, num_heads, seqlen_q), natural logarithm.
        Rows with no visible key give out 0 and lse -inf.
    """
    import torch

    q, k, v = (bshd(tensor, layout) for tensor in (q, k, v))
    batch, seqlen_q, heads, head_dim = q.shape
    scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(head_dim)
    out = torch.empty(batch, seqlen_q, heads, v.shape[3], dtype=torch.float64, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float64, device=q.device)
    rows = torch.arange(seqlen_q, device=q.device)
    seen = visible(rows, seqlen_q, k.shape[1], causal)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            head = q[b, :, h], k[b, :, kv], v[b, :, kv]
            out[b, :, h], lse[b, h] = exact_rows(*head, seen, scale)
    return bshd(out, layout), lse


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float,
) -> torch.Tensor:
    """The formula in PyTorch operations in the inputs' own dtype: what a fused kernel replaces.

    Args:
        q: (batch, num_heads, seqlen_q, head_dim).
        k: (batch, num_kv_heads, seqlen_k, head_dim).
        v: (batch, num_kv_heads, seqlen_k, head_dim_v).
        causal: aligned bottom-right.
        softmax_scale: folded into k, as in FlashAttention's tests.

    Returns:
        out, (batch, num_heads, seqlen_q, head_dim_v).
    """
    import torch

    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ (k * softmax_scale).transpose(-2, -1)
    if causal:
        rows = torch.arange(q.shape[2], device=q.device)
        seen = visible(rows, q.shape[2], k.shape[2], causal)
        hidden = torch.arange(k.shape[2], device=q.device) >= seen[:, None]
        scores.masked_fill_(hidden, -math.inf)
        if q.shape[2] > k.shape[2]:  # rows that see nothing
            return (torch.softmax(scores, -1) @ v).masked_fill((seen == 0)[:, None], 0.0)
    return torch.softmax(scores, -1) @ v


def visible(rows: torch.Tensor, seqlen_q: int, seqlen_k: int, causal: bool) -> torch.Tensor:
    """How many keys each row sees; it sees the first so many."""
    import torch

    if not causal:
        return torch.full_like(rows, seqlen_k)
    return (rows + 1 + seqlen_k - seqlen_q).clamp(0, seqlen_k)


def _chunks(rows: int, seqlen_k: int, device_type: str) -> Iterator[slice]:
    step = max(1, _SCORES_BYTES[device_type] // (8 * max(seqlen_k, 1)))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def exact_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact out and lse of the rows (n, head_dim) of one head, in float64."""
    import torch

    k, v = k.double(), v.double()
    keys = torch.arange(len(k), device=k.device)
    outs, lses = [], []
    for part in _chunks(len(q), len(k), k.device.type):
        scores = q[part].double() @ k.T * scale
        scores.masked_fill_(keys >= seen[part, None], -math.inf)
        lse = scores.logsumexp(-1)
        # exp(-inf - -inf) is NaN: rows that see nothing weigh nothing.
        weights = scores.sub_(lse.clamp_min(-1e300)[:, None]).exp_()
        outs.append(weights @ v)
        lses.append(lse)
    if not outs:
        return v.new_empty(0, v.shape[1]), v.new_empty(0)
    return torch.cat(outs), torch.cat(lses)


def low_precision_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """The rows of one head's out, each result rounded to the inputs' dtype.

    Products run in float32 on operands that are exact in it and are then rounded: what matrix units
    do, and as quick on a CPU that has none for the dtype.
    """
    import torch

    dtype = q.dtype
    k, v = (k * scale).float(), v.float()
    keys = torch.arange(len(k), device=k.device)
    outs = []
    for part in _chunks(len(q), len(k), k.device.type):
        scores = (q[part].float() @ k.T).to(dtype).float()
        scores.masked_fill_(keys >= seen[part, None], -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num_(0.0).to(dtype)
        outs.append((weights.float() @ v).to(dtype))
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
