"""flash-attn 2: its functions, by their names, arguments and defaults, served by autoflash.

    from autoflash.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

docs/integrations/flash_attn.md lists what differs. The packed functions have no kernel of their
own yet: each run of sequences of equal lengths is one call of autoflash.attention on views.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoflash.errors import InvalidInput, UnsupportedProblem
from autoflash.runtime.attention import attention

Result = Tensor | tuple[Tensor, Tensor, None]
"""out, or with return_attn_probs=True (out, lse, None)."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over a batch of equally long sequences.

    The masks are those of autoflash.attention, which are those of flash-attn: causal is aligned to
    the bottom right corner, and a row that sees no key gives zeros.

    Args:
        q: queries, (batch, seqlen_q, num_heads, head_dim); float16, bfloat16 or float32.
        k: keys, (batch, seqlen_k, num_kv_heads, head_dim); num_kv_heads divides num_heads.
        v: values, (batch, seqlen_k, num_kv_heads, head_dim_v).
        dropout_p: only 0.0.
        softmax_scale: factor of the scores; None is 1/sqrt(head_dim).
        causal: whether a query sees only keys up to its own position.
        window_size: (left, right), how many keys a query sees before and after its own position;
            -1 is no bound.
        softcap: scores become softcap * tanh(score / softcap); 0.0 is off.
        alibi_slopes: only None.
        deterministic: about gradients, which PyTorch computes; the output always repeats.
        return_attn_probs: whether to return the lse too.

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim_v), dtype of q.
        lse: only with return_attn_probs=True, then (out, lse, None), where flash-attn's third is
            for its own tests of dropout. (batch, num_heads, seqlen_q), float32, natural
            logarithm; -inf where a row sees no key.

    Raises:
        InvalidInput: shapes, dtypes, devices or options that cannot be meant.
        UnsupportedProblem: dropout, ALiBi, or gradients that must repeat.

    Source:
        The interface of flash-attn 2.8, flash_attn/flash_attn_interface.py.
    """
    asked = _Options(softmax_scale, causal, window_size, softcap, return_attn_probs)
    _refuse(dropout_p, alibi_slopes, None)
    _refuse_gradients_that_repeat(deterministic, q, k, v)
    out, lse = asked.call(*map(_rows_adjacent, (q, k, v)))
    return (out, lse, None) if lse is not None else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As flash_attn_func, with keys and values in one tensor.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        kv: (batch, seqlen_k, 2, num_kv_heads, head_dim).
        dropout_p: and what follows, as in flash_attn_func.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.
    """
    k, v = _unpacked("kv", kv, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As flash_attn_func, with queries, keys and values in one tensor.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim).
        dropout_p: and what follows, as in flash_attn_func.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.
    """
    q, k, v = _unpacked("qkv", qkv, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention over sequences of any lengths, packed one after the other.

    The lengths are read from the device first, which waits for all work queued there. Sequences
    that follow each other and are equally long are one call, on views; if that is all of them
    nothing is copied, else the outputs are joined by one copy.

    Args:
        q: queries, (total_q, num_heads, head_dim).
        k: keys, (total_k, num_kv_heads, head_dim).
        v: values, (total_k, num_kv_heads, head_dim_v).
        cu_seqlens_q: (batch + 1,), int32: sequence i has the rows from cu_seqlens_q[i] up to
            cu_seqlens_q[i + 1] of q. Lengths may be 0. Rows after the last give zeros.
        cu_seqlens_k: (batch + 1,), int32, likewise of k and v.
        max_seqlen_q: at least the longest of q; kernels do not need it, so it is only checked.
        max_seqlen_k: likewise of k.
        dropout_p: and what follows, as in flash_attn_func.
        softmax_scale: likewise.
        causal: likewise, within each sequence.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.
        block_table: only None.

    Returns:
        out: (total_q, num_heads, head_dim_v), dtype of q.
        lse: only with return_attn_probs=True, then (out, lse, None). (num_heads, total_q), float32.

    Raises:
        InvalidInput: as flash_attn_func; or cu_seqlens that are not what is said above.
        UnsupportedProblem: as flash_attn_func; a paged cache; capture of a CUDA graph.
    """
    asked = _Options(softmax_scale, causal, window_size, softcap, return_attn_probs)
    _refuse(dropout_p, alibi_slopes, block_table)
    _refuse_gradients_that_repeat(deterministic, q, k, v)
    packed = {"q": q, "k": k, "v": v}
    for name, tensor in packed.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            raise InvalidInput(
                f"{name} is {_told(tensor)}; a packed tensor (total, num_heads, head_dim) is "
                "needed. A batch of equally long sequences goes to flash_attn_func."
            )
    if k.shape[0] != v.shape[0]:
        raise InvalidInput(f"k has {k.shape[0]} rows and v {v.shape[0]}; each key needs a value.")
    bounds_q, bounds_k = _bounds(cu_seqlens_q, cu_seqlens_k)
    _check("q", bounds_q, q, max_seqlen_q)
    _check("k", bounds_k, k, max_seqlen_k)
    q, k, v = map(_rows_adjacent, (q, k, v))
    outs, lses = [], []
    for run in _runs(bounds_q, bounds_k):
        out, lse = asked.call(run.of_q(q), run.of_k(k), run.of_k(v))
        outs.append(out.flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1))
    beyond = q.shape[0] - bounds_q[-1]
    if beyond or not outs:
        outs.append(q.new_zeros(beyond, q.shape[1], v.shape[2]))
        lses.append(q.new_full((q.shape[1], beyond), float("-inf"), dtype=torch.float32))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    if not return_attn_probs:
        return joined
    return joined, lses[0].contiguous() if len(lses) == 1 else torch.cat(lses, dim=1), None


# A call ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Options:
    softmax_scale: float | None
    causal: bool
    window_size: Any
    softcap: float
    return_lse: bool

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Out and, where it was asked for, lse of (batch, seqlen, num_heads, head_dim)."""
        # No window is None to autoflash: the same call, in its key too.
        window = self.window_size
        result = attention(
            q, k, v, causal=self.causal, softcap=self.softcap, softmax_scale=self.softmax_scale,
            window_size=None if window in ((-1, -1), [-1, -1]) else window,
            return_lse=self.return_lse,
        )  # fmt: skip
        return result if isinstance(result, tuple) else (result, None)


def _refuse(dropout_p: float, alibi_slopes: Tensor | None, block_table: Tensor | None) -> None:
    if dropout_p:
        raise UnsupportedProblem(
            f"dropout_p={dropout_p}: kernels of autoflash have no dropout. Pass 0.0, as for "
            "evaluation, or train with torch.nn.functional.scaled_dot_product_attention."
        )
    if alibi_slopes is not None:
        raise UnsupportedProblem(
            f"alibi_slopes is {_told(alibi_slopes)}: kernels of autoflash add no bias. Pass None, "
            "or use torch.nn.attention.flex_attention."
        )
    if block_table is not None:
        raise UnsupportedProblem(
            f"block_table is {_told(block_table)}: kernels of autoflash read no paged cache. "
            "Gather the pages of each sequence into packed k and v, and pass None."
        )


def _refuse_gradients_that_repeat(deterministic: bool, *tensors: Tensor) -> None:
    if not deterministic or torch.are_deterministic_algorithms_enabled():
        return
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise UnsupportedProblem(
            "deterministic=True: PyTorch computes these gradients, and repeats their bits only "
            "after torch.use_deterministic_algorithms(True). Call that, or pass False."
        )


def _rows_adjacent(x: Tensor) -> Tensor:
    """The same values with a last stride of 1, which kernels need and flash-attn makes up for."""
    if isinstance(x, Tensor) and x.dim() and x.stride(-1) != 1:
        return x.contiguous()
    return x


def _unpacked(name: str, x: Tensor, count: int) -> tuple[Tensor, ...]:
    if not isinstance(x, Tensor) or x.dim() != 5 or x.shape[2] != count:
        raise InvalidInput(
            f"{name} is {_told(x)}; (batch, seqlen, {count}, num_heads, head_dim) is needed."
        )
    return x.unbind(dim=2)


def _told(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


# Packed sequences ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """`count` sequences of equal lengths, the first of which begins at these rows."""

    count: int
    start_q: int
    length_q: int
    start_k: int
    length_k: int

    def of_q(self, x: Tensor) -> Tensor:
        return _cut(x, self.start_q, self.count, self.length_q)

    def of_k(self, x: Tensor) -> Tensor:
        return _cut(x, self.start_k, self.count, self.length_k)


def _cut(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """(count, length, num_heads, head_dim), a view."""
    return x[start : start + count * length].view(count, length, *x.shape[1:])


def _runs(bounds_q: list[int], bounds_k: list[int]) -> Iterator[_Run]:
    """What can be one call each, in order; sequences without queries are part of none."""
    run: _Run | None = None
    for i in range(len(bounds_q) - 1):
        length_q, length_k = bounds_q[i + 1] - bounds_q[i], bounds_k[i + 1] - bounds_k[i]
        follows = (
            run is not None
            and (run.length_q, run.length_k) == (length_q, length_k)
            and run.start_k + run.count * length_k == bounds_k[i]
        )
        if run is not None and follows:
            run = _Run(run.count + 1, run.start_q, length_q, run.start_k, length_k)
        elif length_q:
            if run is not None:
                yield run
            run = _Run(1, bounds_q[i], length_q, bounds_k[i], length_k)
    if run is not None:
        yield run


def _bounds(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[list[int], list[int]]:
    """Both as numbers, with one wait for the device."""
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if (
            not isinstance(cu_seqlens, Tensor)
            or cu_seqlens.dtype != torch.int32
            or cu_seqlens.dim() != 1
            or not cu_seqlens.numel()
        ):
            kind = f"{cu_seqlens.dtype} " if isinstance(cu_seqlens, Tensor) else ""
            raise InvalidInput(
                f"{name} is {kind}{_told(cu_seqlens)}; an int32 tensor (batch + 1,) is needed, 0 "
                "and then where each sequence ends."
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise InvalidInput(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0]} entries and cu_seqlens_k "
            f"{cu_seqlens_k.shape[0]}; both need one for each sequence and one more."
        )
    if cu_seqlens_q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedProblem(
            "flash_attn_varlen_func cannot be captured in a CUDA graph: the lengths in cu_seqlens "
            "decide which kernels are launched, and are read from the device to know. Capture "
            "flash_attn_func on sequences of one length, or do not capture this call."
        )
    if cu_seqlens_q is cu_seqlens_k:
        bounds: list[int] = cu_seqlens_q.tolist()
        return bounds, bounds
    both = torch.stack([cu_seqlens_q, cu_seqlens_k.to(cu_seqlens_q.device)]).tolist()
    return both[0], both[1]


def _check(name: str, bounds: list[int], packed: Tensor, most: int) -> None:
    """Refuse lengths that do not fit the packed tensor."""
    total = packed.shape[0]
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] > total or min(lengths, default=0) < 0:
        raise InvalidInput(
            f"cu_seqlens_{name}={_shortened(bounds)} does not start at 0, decreases, or ends "
            f"beyond the {total} rows of {name}."
        )
    longest = max(lengths, default=0)
    if int(most) < longest:
        raise InvalidInput(
            f"max_seqlen_{name}={int(most)}, but a sequence of cu_seqlens_{name} has {longest} "
            "rows; flash-attn would leave out the rows beyond. Pass the longest length."
        )


def _shortened(bounds: list[int]) -> str:
    return repr(bounds) if len(bounds) <= 9 else f"{bounds[:8]!r}... of {len(bounds)}"
