"""Masks of Hugging Face transformers: which of them are calls of kernels, and of which?

transformers makes one mask for all layers of a kind before the first of them runs. Ours is the
one that it would give torch's scaled_dot_product_attention, None included, and what a kernel can
do without reading it is written on it as a Pattern. Whoever slices or adds to a mask gets a new
tensor, on which nothing is written, and attention goes by the mask itself: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

_WRITTEN = "_autoflash_pattern"


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring sequences that are padded alike; what is in no part gives zeros."""

    rows: slice
    queries: slice
    keys: slice

    def covers(self, batch: int, seqlen_q: int) -> bool:
        """Whether it is all of the batch and all of its queries."""
        return self.rows == slice(0, batch) and self.queries == slice(0, seqlen_q)


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a mask says, as calls of kernels.

    Attributes:
        shape: of the mask without its heads: batch, seqlen_q, seqlen_k.
        causal: whether queries see keys up to their own position, the last query of a part being
            at the position of its last key.
        window_size: how many before and after it, else None.
        parts: at most one for each sequence.
        version: of the mask when this was written.
    """

    shape: tuple[int, int, int]
    causal: bool
    window_size: tuple[int, int] | None
    parts: tuple[Part, ...]
    version: int


def pattern_of(mask: Tensor, query: Tensor, key: Tensor) -> Pattern | None:
    """What is written on a mask, if it is still that mask and fits these (batch, _, seqlen, _)."""
    pattern: Pattern | None = getattr(mask, _WRITTEN, None)
    if pattern is None or mask.is_inference() or pattern.version != mask._version:
        return None
    return pattern if pattern.shape == (query.shape[0], query.shape[2], key.shape[2]) else None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """The mask function to register; arguments and result as transformers' sdpa_mask.

    Returns:
        (batch_size, 1, q_length, kv_length), bool, True where a query sees a key; or None, where
        attention without a mask, causal if the layer is, is the same.
    """
    # Lengths are read from the device below, once for all layers; a graph must not wait for them.
    kind = None if is_tracing(attention_mask) else _kind(mask_function, others)
    # A tensor made in inference mode has no version by which to notice that it was written to.
    versioned = kind is not None and torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if versioned else nullcontext():
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            **others,
        )  # fmt: skip
    if mask is None or kind is None or is_tracing(mask) or mask.is_inference():
        return mask
    if attention_mask is not None and attention_mask.dim() != 2:
        return mask
    causal, window = kind
    if window is not None and not causal and (q_length != kv_length or q_offset or kv_offset):
        return mask
    seen = _seen(attention_mask, batch_size, kv_length, kv_offset)
    if seen is not None:
        shift = int(q_offset) - kv_offset
        parts = _parts(seen, q_length, kv_length, shift, causal, aligned=window is not None)
        shape = (batch_size, q_length, kv_length)
        setattr(mask, _WRITTEN, Pattern(shape, causal, window, tuple(parts), mask._version))
    return mask


def _kind(
    mask_function: Callable[..., Any], others: dict[str, Any]
) -> tuple[bool, tuple[int, int] | None] | None:
    """Whether it is causal, and its window; None for masks of any other kind.

    transformers permits to leave a mask away where nothing was added to its kind: packed
    sequences, blocks of images, a mask of the model's own. Chunks look like windows otherwise.
    """
    causal = bool(others.get("allow_is_causal_skip", False))
    if not causal and not others.get("allow_is_bidirectional_skip", False):
        return None
    if mask_function is (causal_mask_function if causal else bidirectional_mask_function):
        return causal, None
    config, size = others.get("config"), others.get("local_size")
    if size is None or size != getattr(config, "sliding_window", None):
        return None
    if size == getattr(config, "attention_chunk_size", None):
        return None
    return causal, (size - 1, 0) if causal else (size, size)


def _seen(
    attention_mask: Tensor | None, batch_size: int, kv_length: int, kv_offset: int
) -> list[tuple[int, int]] | None:
    """First key that is no padding, and the one after the last, of each sequence.

    None where padding is between others. (0, 0) where all is padding.
    """
    if attention_mask is None:
        return [(0, kv_length)] * batch_size
    whole = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    kept = whole[:, kv_offset : kv_offset + kv_length].to(torch.int32)
    count, first = kept.sum(dim=1), kept.argmax(dim=1)
    stop = kv_length - kept.flip(1).argmax(dim=1)
    found = torch.stack([count, first, stop], dim=1).tolist()
    if any(count not in (0, stop - first) for count, first, stop in found):
        return None
    return [(first, stop) if count else (0, 0) for count, first, stop in found]


def _parts(
    seen: list[tuple[int, int]],
    q_length: int,
    kv_length: int,
    shift: int,
    causal: bool,
    aligned: bool,
) -> Iterator[Part]:
    """Query row i is at the position of key i + shift; where it is padding, it is in no part."""
    start = 0
    for row in range(1, len(seen) + 1):
        if row < len(seen) and seen[row] == seen[start]:
            continue
        rows, (first, stop) = slice(start, row), seen[start]
        start = row
        queries = slice(0, q_length)
        if causal or aligned:
            queries = slice(max(first - shift, 0), min(stop - shift, q_length))
        if causal:
            stop = min(stop, queries.stop + shift)
        if queries.start < queries.stop and first < stop:
            yield Part(rows, queries, slice(first, stop))
