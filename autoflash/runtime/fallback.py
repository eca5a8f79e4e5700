"""PyTorch's own attention with our semantics: what serves a call that no kernel of ours can.

Differences to F.scaled_dot_product_attention that are made up for here: its is_causal is aligned
top-left, it knows windows only as masks of seqlen_q x seqlen_k and no softcap and no 8 bits, rows
that see no key come out as NaN, and it does not return the lse. All of it is differentiable and can
be captured in a CUDA graph.

Whatever holds a score for every pair is done in parts of the query rows, so that memory stays
bounded, and with gradients each part is computed again in the backward pass instead of kept.
torch.compile would unroll the parts (half a second of tracing for each): to it such a call is an
operator, and only what is no more than PyTorch's attention is traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel

# By its own name: F's may be replaced by a function that calls autoflash.
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from autoflash.codegen.ops import LAYOUT_AXES
from autoflash.errors import UnsupportedProblem
from autoflash.runtime.options import Window
from autoflash.runtime.request import FP8, UNSCALED, Descales

_SCORES_AT_ONCE = 1 << 26
"""Most scores held at once: 256 MiB of float32, and a softcap holds some four arrays of them."""

_FEWEST_ROWS = 256
"""Rows of a part where a narrow window would allow fewer: each part costs several launches."""

_saves_tensors = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    return_lse: bool,
    layout: str,
    window: Window = (None, None),
    softcap: float = 0.0,
    descales: Descales = UNSCALED,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by PyTorch's operators; arguments and semantics as autoflash.attention.

    Returns:
        out, contiguous in `layout`; and the lse, or None where it was not asked for.

    Raises:
        UnsupportedProblem: PyTorch cannot do it either.
    """
    _, s, h = LAYOUT_AXES[layout]
    dtype = q.dtype
    if s != 2:
        q, k, v = (tensor.transpose(s, h) for tensor in (q, k, v))
    left, right = window
    if causal:
        right = 0
    # Aligned bottom-right, the last row sees the last key; only first rows may see none.
    hidden = 0 if right is None else max(q.shape[2] - k.shape[2] - right, 0)
    try:
        if dtype == FP8:
            q, k, v = (
                _dequantised(*pair, q.shape[1]) for pair in zip((q, k, v), descales, strict=True)
            )
        q, k, v = (_realigned(tensor) for tensor in (q, k, v))
        visible = q[:, :, hidden:] if hidden else q
        out, lse = _visible(visible, k, v, left, right, softmax_scale, softcap, return_lse)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedProblem(
            f"neither a template nor PyTorch can serve q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)} (batch, num_heads, seqlen, head_dim) of {dtype} on {q.device}. "
            f"PyTorch says: {str(error).strip().splitlines()[0]}"
        ) from error
    if hidden:
        out = F.pad(out, (0, 0, hidden, 0))
        lse = None if lse is None else F.pad(lse, (hidden, 0), value=float("-inf"))
    return (out.transpose(s, h) if s != 2 else out).contiguous(), lse


def is_traceable(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool,
    window: Window,
    softcap: float,
    return_lse: bool,
    layout: str,
) -> bool:
    """Whether `attention` is a single call of PyTorch's, which compilers see through."""
    s = LAYOUT_AXES[layout][1]
    if return_lse or q.dtype == FP8 or softcap != 0.0 or window != (None, None):
        return False
    return not causal or q.shape[s] == k.shape[s]


def _realigned(x: torch.Tensor) -> torch.Tensor:
    """The same values at an address that PyTorch's fused kernels on a GPU can read.

    They read 16 bytes at once and check strides, but not where a view begins: PyTorch 2.11 on an
    H200 ended with "misaligned address", after which a process can do nothing more on that GPU.
    """
    if is_compiling() or not x.is_cuda or x.storage_offset() * x.element_size() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _dequantised(x: torch.Tensor, descale: torch.Tensor | None, num_heads: int) -> torch.Tensor:
    """What 8 bits stand for, in bfloat16: exact without a descale, else rounded once."""
    if descale is None:
        return x.to(torch.bfloat16)
    factors = descale.repeat_interleave(x.shape[1] // descale.shape[1], dim=1)
    return (x.to(torch.float32) * factors[:, :, None, None]).to(torch.bfloat16)


def _visible(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Out and lse in (batch, num_heads, seqlen, head_dim) of rows that see a key, if any is."""
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    if 0 in (batch, seqlen_q, seqlen_k):
        # A product over no elements: zeros that autograd knows, where SDPA would give NaN.
        keys, values = (_expanded(x, num_heads) for x in (k, v))
        out = (q @ keys.transpose(2, 3)) @ values
        minus_inf = q.new_full((batch, num_heads, seqlen_q), float("-inf"), dtype=torch.float32)
        return out, minus_inf if return_lse else None
    # A bound that no row reaches is none: the last row looks farthest to the left, the first to
    # the right. So a single last row, which sees every key, is not causal.
    left = None if left is None or left >= seqlen_k - 1 else left
    right = None if right is None or right >= seqlen_q - 1 else right
    square = left is None and right == 0 and seqlen_q == seqlen_k
    if softcap or not (square or (left is None and right is None)):
        return _in_parts(q, k, v, left, right, scale, softcap, return_lse)
    # Where sizes are symbols so are comparisons of them, which this function does not take.
    options: dict[str, Any] = {"is_causal": True} if square else {}
    if num_heads != k.shape[1]:
        options["enable_gqa"] = True
    with _backend():
        out = scaled_dot_product_attention(q, k, v, scale=scale, **options)
    return out, _in_parts(q, k, None, left, right, scale, softcap, True)[1] if return_lse else None


def _backend() -> AbstractContextManager[None]:
    """PyTorch's own choice, but for forward-mode gradients, which its fused kernels lack."""
    if is_compiling() or forward_ad._current_level == -1:
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


# In parts ---------------------------------------------------------------------------------------


def _in_parts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `_visible`, for calls that see a key in every row; without v, out has no meaning."""
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    keys = _expanded(k, num_heads)
    # An operand that stands in for no values has no columns.
    values = keys[..., :0] if v is None else _expanded(v, num_heads)
    budget = max(_SCORES_AT_ONCE // (4 if softcap else 1) // (batch * num_heads), 1)
    parts = list(_parts(seqlen_q, seqlen_k, left, right, budget))
    again = len(parts) > 1 and _can_recompute(q, keys, values)
    results = []
    for rows, columns in parts:
        shift = rows.start + seqlen_k - seqlen_q - columns.start
        part = partial(
            _part, shift=shift, left=left, right=right, scale=scale, softcap=softcap,
            return_lse=return_lse,
        )  # fmt: skip
        if again:
            part = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        results.append(part(q[:, :, rows], keys[:, :, columns], values[:, :, columns]))
    out = torch.cat([out for out, _ in results], dim=2)
    lses = [lse for _, lse in results if lse is not None]
    return out, torch.cat(lses, dim=2) if lses else None


def _parts(
    seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, budget: int
) -> Iterator[tuple[slice, slice]]:
    """Query rows, each time with the keys that any of them sees: at most `budget` pairs."""
    rows, reach = seqlen_q, seqlen_k
    if left is not None and right is not None:
        reach = min(left + right + 1, seqlen_k)
        rows = min(seqlen_q, max(reach, _FEWEST_ROWS))  # else most of a part would be masked
    while rows > 1 and rows * min(rows + reach, seqlen_k) > budget:
        rows = (rows + 1) // 2
    offset = seqlen_k - seqlen_q
    for start in range(0, seqlen_q, rows):
        stop = min(start + rows, seqlen_q)
        first = 0 if left is None else max(start + offset - left, 0)
        last = seqlen_k if right is None else min(stop + offset + right, seqlen_k)
        yield slice(start, stop), slice(first, last)


def _can_recompute(*operands: torch.Tensor) -> bool:
    """Whether there will be a backward pass, of a kind that can compute a part again."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in operands)):
        return False
    # torch.func.grad forbids what checkpoints are made of; it then keeps the scores.
    return bool(_saves_tensors())


def _part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    shift: int,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Out and lse of rows i that see keys from i + shift - left to i + shift + right."""
    mask = _mask(q, k, shift, left, right)
    out = q.new_empty((*q.shape[:3], 0))
    if v.shape[3] and not softcap:
        with _backend():
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if not softcap and not return_lse:
        return out, None
    compute = torch.promote_types(q.dtype, torch.float32)
    # Autocast would put these products back into 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(compute) * scale) @ k.to(compute).transpose(2, 3)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        lse = torch.logsumexp(scores, dim=3)
        if softcap:
            out = (torch.exp(scores - lse[..., None]) @ v.to(compute)).to(q.dtype)
    return out, lse.to(torch.float32) if return_lse else None


def _mask(
    q: torch.Tensor, k: torch.Tensor, shift: int, left: int | None, right: int | None
) -> torch.Tensor | None:
    """(rows, columns), True where a row sees a key; None where all see all."""
    positions = torch.arange(q.shape[2], device=q.device)[:, None] + shift
    columns = torch.arange(k.shape[2], device=q.device)
    seen = None if left is None else columns >= positions - left
    if right is None:
        return seen
    before = columns <= positions + right
    return before if seen is None else seen & before


def _expanded(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Key or value heads repeated for the query heads they serve."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)
