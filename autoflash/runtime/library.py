"""torch.ops.autoflash: the call as one opaque operator, for torch.compile and torch.export.

fwd is any call without gradients; fwd_by_torch has them, and is what PyTorch serves in parts.

An operator costs several microseconds per call in PyTorch's dispatcher, so that eager calls go
round it (runtime/attention.py). Library.define and impl cost half of torch.library.custom_op.
"""

from __future__ import annotations

from typing import Any

import torch

from autoflash.codegen.ops import LAYOUT_AXES
from autoflash.runtime import fallback, request, serving
from autoflash.runtime.request import Descales

# Kept for the life of the process: the operator goes when its Library does.
_LIBRARY = torch.library.Library("autoflash", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    # What was added later comes last and has a default, so that exported programs stay valid.
    "fwd(Tensor q, Tensor k, Tensor v, bool causal, float? softmax_scale, bool return_lse, "
    "str layout, SymInt? window_left=None, SymInt? window_right=None, float softcap=0.0, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None) "
    "-> (Tensor, Tensor)",
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
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # As an eager call without a window or descales gives them: its key is then the same.
    unbounded = window_left is None and window_right is None
    window_size = None if unbounded else (window_left, window_right)
    unscaled = q_descale is None and k_descale is None and v_descale is None
    descales = None if unscaled else (q_descale, k_descale, v_descale)
    result = serving.call(
        q, k, v, causal, window_size, softcap, softmax_scale, descales, return_lse, layout
    )
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
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and strides of `_fwd`, which are those of freshly made contiguous tensors."""
    descales = (q_descale, k_descale, v_descale)
    sizes = [size for t in (q, k, v, *descales) if t is not None for size in t.shape]
    if layout not in LAYOUT_AXES or not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        request.check(q, k, v, causal=causal, layout=layout, descales=descales)
    if all(isinstance(size, int) for size in sizes):
        # Where sizes are symbols the checks would become guards: left to the call itself.
        request.check(q, k, v, causal=causal, layout=layout, descales=descales)
    b, s, h = LAYOUT_AXES[layout]
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=request.out_dtype(q.dtype))
    lse_shape = (q.shape[b], q.shape[h], q.shape[s]) if return_lse else (0,)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


_LIBRARY.impl("fwd", _fwd, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("autoflash::fwd", _fake, lib=_LIBRARY)

fwd = torch.ops.autoflash.fwd.default

# With gradients --------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "bool causal, SymInt? window_left, SymInt? window_right, float softcap, float softmax_scale, "
    "bool return_lse, str layout"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"fwd_by_torch({_ARGUMENTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"bwd_by_torch(Tensor out_grad, Tensor lse_grad, {_ARGUMENTS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fwd_by_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_descale: torch.Tensor | None,
    k_descale: torch.Tensor | None,
    v_descale: torch.Tensor | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    softmax_scale: float,
    return_lse: bool,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    descales: Descales = (q_descale, k_descale, v_descale)
    request.check(q, k, v, causal=causal, layout=layout, descales=descales)
    out, lse = fallback.attention(
        q, k, v, causal=causal, window=(window_left, window_right), softcap=softcap,
        softmax_scale=softmax_scale, descales=descales, return_lse=return_lse, layout=layout,
    )  # fmt: skip
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


def _fake_by_torch(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, *descales = arguments[:6]
    causal, left, right, softcap, scale, return_lse, layout = arguments[6:]
    options = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    return _fake(q, k, v, causal, scale, return_lse, layout, left, right, softcap, **options)


def _bwd_by_torch(
    out_grad: torch.Tensor, lse_grad: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    """Gradients of the tensors given among q, k, v and the descales: all is computed again."""
    tensors, others = arguments[:6], arguments[6:]
    with torch.enable_grad():
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in tensors]
        out, lse = _fwd_by_torch(*leaves, *others)
    results = [(out, out_grad)]
    if lse.requires_grad:  # not if it was not asked for, nor of rows without keys
        results.append((lse, lse_grad))
    outputs, grads = zip(*results, strict=True)
    given = [leaf for leaf in leaves if leaf is not None]
    return [grad.contiguous() for grad in torch.autograd.grad(outputs, given, grads)]


def _fake_bwd_by_torch(
    out_grad: torch.Tensor, lse_grad: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in arguments[:6] if tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.others = inputs[6:]


def _backward(ctx: Any, out_grad: torch.Tensor, lse_grad: torch.Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = iter(
        torch.ops.autoflash.bwd_by_torch(
            out_grad.contiguous(), lse_grad.contiguous(), *tensors, *ctx.others
        )
    )
    of_tensors = [None if tensor is None else next(grads) for tensor in tensors]
    return (*of_tensors, *[None] * len(ctx.others))


for _name, _impl, _shapes in (
    ("fwd_by_torch", _fwd_by_torch, _fake_by_torch),
    ("bwd_by_torch", _bwd_by_torch, _fake_bwd_by_torch),
):
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"autoflash::{_name}", _shapes, lib=_LIBRARY)
torch.library.register_autograd(
    "autoflash::fwd_by_torch", _backward, setup_context=_keep, lib=_LIBRARY
)

fwd_by_torch = torch.ops.autoflash.fwd_by_torch.default
"""(out, lse) of tensors that need gradients; the lse has no elements unless asked for."""
