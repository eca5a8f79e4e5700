"""PyTorch's own attention with the semantics of the kernels: serves what no kernel here can."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_SCORES_AT_ONCE = 1 << 26
"""Most scores held at once, in float32: 256 MiB."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    window: tuple[int | None, int | None],
    softcap: float,
    scale: float,
    descales: tuple[torch.Tensor | None, ...],
    layout: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Out, contiguous in `layout`, and the lse where it is asked for; differentiable.

    PyTorch's is_causal is aligned top-left and its rows without keys are NaN: masks and such rows
    are made up for here.
    """
    if layout == "bshd":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if q.dtype == torch.float8_e4m3fn:
        q, k, v = (_dequantised(x, d) for x, d in zip((q, k, v), descales, strict=True))
    if scale <= 0:  # of which PyTorch's fused kernels make NaN behind a mask
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    left, right = window
    right = 0 if causal else right
    # A bound that no row reaches is none.
    left = None if left is None or left >= seqlen_k - 1 else left
    right = None if right is None or right >= seqlen_q - 1 else right
    every_row_sees = seqlen_k > 0 and (seqlen_q <= seqlen_k or (left is None and right is None))
    lse = None
    if softcap or return_lse or not every_row_sees:
        out, lse = _written_out(q, k, v, left, right, softcap, scale)
    else:
        square = left is None and right == 0 and seqlen_q == seqlen_k
        bounded = not square and (left is not None or right is not None)
        out = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=_seen(q, 0, seqlen_q, seqlen_k, left, right) if bounded else None,
            is_causal=square, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    out = out.transpose(1, 2) if layout == "bshd" else out
    return out.contiguous(), lse if return_lse else None


def _seen(
    q: torch.Tensor, start: int, stop: int, seqlen_k: int, left: int | None, right: int | None
) -> torch.Tensor:
    """Which keys the rows from `start` to `stop` see."""
    rows = torch.arange(start, stop, device=q.device)[:, None] + seqlen_k - q.shape[2]
    keys = torch.arange(seqlen_k, device=q.device)
    seen = torch.ones(stop - start, seqlen_k, dtype=torch.bool, device=q.device)
    seen = seen if left is None else seen & (keys >= rows - left)
    return seen if right is None else seen & (keys <= rows + right)


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of attention in float32 or more, some rows at a time."""
    group, seqlen_k = q.shape[1] // k.shape[1], k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(compute).repeat_interleave(group, 1) for x in (k, v))
    rows = max(_SCORES_AT_ONCE // max(q.shape[0] * q.shape[1] * seqlen_k, 1), 1)
    outs = [q.new_empty((*q.shape[:2], 0, v.shape[3]))]
    lses = [q.new_empty((*q.shape[:2], 0), dtype=torch.float32)]
    for start in range(0, q.shape[2], rows):
        stop = min(start + rows, q.shape[2])
        scores = (q[:, :, start:stop].to(compute) * scale) @ keys.transpose(2, 3)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        seen = _seen(q, start, stop, seqlen_k, left, right)
        scores = scores.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(scores, 3)
        finite = lse.masked_fill(lse == float("-inf"), 0.0)  # or exp(-inf + inf) would be NaN
        outs.append((torch.exp(scores - finite[..., None]) @ values).to(q.dtype))
        lses.append(lse.to(torch.float32))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _dequantised(x: torch.Tensor, descale: torch.Tensor | None) -> torch.Tensor:
    """What 8 bits stand for, in bfloat16."""
    if descale is None:
        return x.to(torch.bfloat16)
    factors = descale.repeat_interleave(x.shape[1] // descale.shape[1], 1)
    return (x.to(torch.float32) * factors[:, :, None, None]).to(torch.bfloat16)
