"""PyTorch's own attention with our semantics: what serves a call that no kernel of ours can.

Differences to F.scaled_dot_product_attention that are made up for here: its is_causal is aligned
top-left, rows that see no key come out as NaN, and it does not return the lse. All of it is
differentiable, can be captured in a CUDA graph and traced by torch.compile.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoflash.codegen.ops import LAYOUT_AXES
from autoflash.errors import UnsupportedProblem

_SCORES_AT_ONCE = 1 << 26
"""Most scores held while computing the lse: 256 MiB of float32."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    return_lse: bool,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by PyTorch's operators; arguments and semantics as autoflash.attention.

    Returns:
        out, contiguous in `layout`; and the lse, or None where it was not asked for.

    Raises:
        UnsupportedProblem: PyTorch cannot do it either.
    """
    _, s, h = LAYOUT_AXES[layout]
    if s != 2:
        q, k, v = (tensor.transpose(s, h) for tensor in (q, k, v))
    # Aligned bottom-right, the last seqlen_k rows of a causal call form a square mask with its
    # diagonal; the rows before them see no key.
    hidden = max(q.shape[2] - k.shape[2], 0) if causal else 0
    visible = q[:, :, hidden:] if hidden else q
    try:
        out = _out(visible, k, v, causal, softmax_scale)
        lse = _lse(visible, k, causal, softmax_scale) if return_lse else None
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedProblem(
            f"neither a template nor PyTorch can serve q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)} (batch, num_heads, seqlen, head_dim) of {q.dtype} on {q.device}. "
            f"PyTorch says: {str(error).strip().splitlines()[0]}"
        ) from error
    if hidden:
        out = F.pad(out, (0, 0, hidden, 0))
        lse = None if lse is None else F.pad(lse, (hidden, 0), value=float("-inf"))
    return (out.transpose(s, h) if s != 2 else out).contiguous(), lse


def _out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> torch.Tensor:
    """Attention in (batch, num_heads, seqlen, head_dim); every row sees a key, or there is none."""
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    if 0 in (batch, seqlen_q, seqlen_k):
        # A product over no elements: zeros that autograd knows, where SDPA would give NaN.
        keys, values = (_expanded(x, num_heads) for x in (k, v))
        return (q @ keys.transpose(2, 3)) @ values
    square = seqlen_q == seqlen_k
    mask = None
    if causal and not square and seqlen_q > 1:  # a single last row sees every key
        mask = _mask(q, k)
    with _backend():
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and square,
            scale=scale,
            enable_gqa=num_heads != k.shape[1],
        )


def _backend() -> AbstractContextManager[None]:
    """PyTorch's own choice, but for forward-mode gradients, which its fused kernels lack."""
    if is_compiling() or forward_ad._current_level == -1:
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def _lse(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Logarithm of the sum of exponentials of each row's scores, (batch, num_heads, seqlen_q)."""
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    compute = torch.promote_types(q.dtype, torch.float32)
    # Autocast would put these products back into 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        keys = _expanded(k, num_heads).to(compute).transpose(2, 3)
        mask = _mask(q, k) if causal else None
        rows = max(_SCORES_AT_ONCE // max(batch * num_heads * seqlen_k, 1), 1)
        parts = []
        for start in range(0, max(seqlen_q, 1), rows):
            scores = (q[:, :, start : start + rows].to(compute) * scale) @ keys
            if mask is not None:
                scores = scores.masked_fill(~mask[start : start + rows], float("-inf"))
            parts.append(_logsumexp(scores))
        return torch.cat(parts, dim=2).to(torch.float32)


def _logsumexp(scores: torch.Tensor) -> torch.Tensor:
    if scores.shape[3] == 0:
        return scores.new_full(scores.shape[:3], float("-inf"))
    return torch.logsumexp(scores, dim=3)


def _mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(seqlen_q, seqlen_k), True where query row i sees key j: j <= i + seqlen_k - seqlen_q."""
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)
    return columns <= rows + (k.shape[2] - q.shape[2])


def _expanded(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Key or value heads repeated for the query heads they serve."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
