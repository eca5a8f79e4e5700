"""torch.ops.autoflash.fwd: the call as one opaque operator, for torch.compile and torch.export.

An operator costs several microseconds per call in PyTorch's dispatcher, so that eager calls go
round it (runtime/attention.py). Library.define and impl cost half of torch.library.custom_op.
"""

from __future__ import annotations

import torch

from autoflash.codegen.ops import LAYOUT_AXES
from autoflash.runtime import request, serving

# Kept for the life of the process: the operator goes when its Library does.
_LIBRARY = torch.library.Library("autoflash", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "fwd(Tensor q, Tensor k, Tensor v, bool causal, float? softmax_scale, bool return_lse, "
    "str layout) -> (Tensor, Tensor)",
    # Rows of adjacent elements are a condition of our kernels, so Inductor may not re-stride.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    return_lse: bool,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    result = serving.call(q, k, v, causal, softmax_scale, return_lse, layout)
    if isinstance(result, tuple):
        return result
    return result, q.new_empty(0, dtype=torch.float32)  # operators return no None


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    return_lse: bool,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and strides of `_fwd`, which are those of freshly made contiguous tensors."""
    sizes = (*q.shape, *k.shape, *v.shape)
    if layout not in LAYOUT_AXES or not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        request.check(q, k, v, causal=causal, layout=layout)
    if all(isinstance(size, int) for size in sizes):
        # Where sizes are symbols the checks would become guards: left to the call itself.
        request.check(q, k, v, causal=causal, layout=layout)
    b, s, h = LAYOUT_AXES[layout]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse_shape = (q.shape[b], q.shape[h], q.shape[s]) if return_lse else (0,)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


_LIBRARY.impl("fwd", _fwd, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("autoflash::fwd", _fake, lib=_LIBRARY)

fwd = torch.ops.autoflash.fwd.default
