"""The attention that transformers calls: which calls reach kernels, and what serves the others?"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from autoflash.errors import UnsupportedProblem
from autoflash.integrations.transformers_masks import pattern_of
from autoflash.runtime.attention import attention

_TAKEN = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")
_SPECIAL = sorted({*inspect.signature(sdpa_attention_forward).parameters} - {*_TAKEN, "kwargs"})
"""What else PyTorch's attention in transformers heeds: a paged cache, position biases."""

_SPARSE = ("indices", "block_indices")
"""Which keys a query sees, instead of a mask (DeepSeek V3.2, MiniMax M3). Models that choose keys
put that into the mask for implementations that are called "eager" or "sdpa", and for no others."""


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function to register.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        query: (batch, num_heads, seqlen_q, head_dim).
        key: (batch, num_kv_heads, seqlen_k, head_dim).
        value: (batch, num_kv_heads, seqlen_k, head_dim_v).
        attention_mask: what `make_mask` made, or anything that broadcasts to (batch, num_heads,
            seqlen_q, seqlen_k): bool, True where a query sees a key, or to be added to the scores.
        dropout: of the weights; PyTorch serves it.
        scaling: factor of the scores; None is 1/sqrt(head_dim).
        is_causal: whether a query sees keys up to its own position, where there is no mask.
        softcap: bound of the scores, before the mask.
        s_aux: a sink for each query head, (num_heads,): a score that takes its share and gives
            nothing.
        others: what else models pass. A sliding window is part of the mask.

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim_v), contiguous.
        weights: (batch, num_heads, seqlen_q, seqlen_k) with output_attentions=True, else None.

    Raises:
        UnsupportedProblem: a paged cache or a position bias together with softcap or sinks; keys
            chosen by index.
    """
    for name in _SPARSE:
        if others.get(name) is not None:
            raise UnsupportedProblem(
                f"{name}: this model chooses the keys that each query sees, and kernels of "
                "autoflash do not take such a choice. Set attn_implementation='sdpa'."
            )
    wants_weights = bool(others.get("output_attentions"))
    special = [name for name in _SPECIAL if others.get(name) is not None]
    if special and (softcap or s_aux is not None):
        raise UnsupportedProblem(
            f"{special[0]} together with {'softcap' if softcap else 's_aux'}: neither autoflash "
            "nor PyTorch's attention has both. Set attn_implementation='eager'."
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not special and not dropout and not wants_weights:
        out = _by_kernels(query, key, value, attention_mask, causal, scaling, softcap, s_aux)
        if out is not None:
            return out, None
    if not special and (wants_weights or softcap or s_aux is not None):
        return _by_definition(
            query, key, value, attention_mask, causal, scaling, softcap, s_aux, dropout
        )
    given = (module, query, key, value, attention_mask)
    served: tuple[Tensor, None] = sdpa_attention_forward(
        *given, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return served


def _by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """Attention by autoflash, or None where the mask is not one that kernels know."""

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: Any = None) -> Tensor:
        q, k, v = (_rows_adjacent(x).transpose(1, 2) for x in (q, k, v))
        result = attention(
            q, k, v, causal=causal, window_size=window, softcap=softcap or 0.0,
            softmax_scale=scaling, return_lse=sinks is not None,
        )  # fmt: skip
        if not isinstance(result, tuple):
            return result
        assert sinks is not None
        out, lse = result
        # Of the sum of exponentials, exp(lse), the sink adds exp(sink): the rest keeps this share.
        share = torch.sigmoid(lse - sinks.float()[:, None])
        return out * share.transpose(1, 2)[..., None].to(out.dtype)

    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if mask is None:
        if causal and seqlen_q > 1 and seqlen_q != seqlen_k:
            if seqlen_k < seqlen_q:
                return None
            # The first tokens in a cache of fixed size: what is behind them is not filled yet.
            key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
        return call(query, key, value, bool(causal))
    if torch.compiler.is_compiling() or (pattern := pattern_of(mask, query, key)) is None:
        return None
    if len(pattern.parts) == 1 and pattern.parts[0].covers(*pattern.shape[:2]):
        keys = pattern.parts[0].keys
        k, v = key[:, :, keys], value[:, :, keys]
        return call(query, k, v, pattern.causal, pattern.window_size)
    if seqlen_q == 1:
        return None  # one launch with the mask instead of one for each sequence
    out = query.new_zeros(query.shape[0], seqlen_q, query.shape[1], value.shape[3])
    for part in pattern.parts:
        q = query[part.rows, :, part.queries]
        k, v = (x[part.rows, :, part.keys] for x in (key, value))
        out[part.rows, part.queries] = call(q, k, v, pattern.causal, pattern.window_size)
    return out


def _rows_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Out and weights, with all scores in memory: for what neither a kernel nor PyTorch has."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    scale = 1.0 / math.sqrt(query.shape[3]) if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal and seqlen_q > 1:
        mask = scores.new_ones(seqlen_q, seqlen_k, dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        # Rows of padding see nothing; -inf would make them, and their gradients, NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=3)
    weights = torch.softmax(scores, dim=3)[..., :seqlen_k].to(query.dtype)
    out = F.dropout(weights, p=dropout) @ value
    return out.transpose(1, 2).contiguous(), weights
