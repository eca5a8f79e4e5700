"""A call's arguments: could any kernel be asked for this, and which Problem is it?

All of this runs once per new combination of shapes, strides, dtypes and devices. A combination
that was valid stays valid, so a later call of the same kind checks nothing again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autoflash.codegen.ops import LAYOUT_AXES
from autoflash.errors import InvalidInput, UnknownName, UnsupportedProblem
from autoflash.problem import ELEMENT_SIZES, Problem
from autoflash.runtime.options import SMALLEST_SCALE, softcap_of, window_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHAPES = {
    "bshd": "(batch, seqlen, num_heads, head_dim)",
    "bhsd": "(batch, num_heads, seqlen, head_dim)",
}
_ALIGNMENT = 16  # bytes: what vectorised loads and TMA need
_MOST = 2**31 - 1  # sizes travel as int32 (codegen/ops.py)

FP8 = torch.float8_e4m3fn
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, FP8)
"""What is served; templates take those of problem.ELEMENT_SIZES."""

Descales = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Factors of what is stored of q, k and v, (batch, num_kv_heads) each; None is 1."""
UNSCALED: Descales = (None, None, None)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    layout: str,
    window_size: object = None,
    softcap: object = 0.0,
    descales: Descales = UNSCALED,
) -> None:
    """Refuse arguments that no kernel could be asked for.

    Raises:
        UnknownName: `layout` is neither "bshd" nor "bhsd".
        InvalidInput: shapes, dtypes or devices do not fit together; names value and limit.
        UnsupportedProblem: a dtype that neither a template nor PyTorch's attention takes.
    """
    named = {"q": q, "k": k, "v": v}
    check_tensors(q, k, v, descales)
    if not isinstance(layout, str) or layout not in LAYOUT_AXES:
        raise UnknownName.of("layout", str(layout), LAYOUT_AXES)
    if not isinstance(causal, bool):
        raise InvalidInput(
            f"causal={causal!r} is a {type(causal).__name__}; True or False is needed. "
            "Of other masks there is only window_size=(left, right)."
        )
    window_of(window_size)
    softcap_of(softcap)
    for name, tensor in named.items():
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InvalidInput(
                f"{name} is sparse or nested; a dense tensor {_SHAPES[layout]} is needed. "
                "Call .to_dense(), or pad it with torch.nested.to_padded_tensor."
            )
        if tensor.dim() != 4:
            raise InvalidInput(
                f"{name} has {tensor.dim()} dimensions, {_shape(tensor)}; layout {layout!r} has "
                f"four, {_SHAPES[layout]}. A single sequence needs {name}.unsqueeze(0)."
            )
    for what in ("dtype", "device"):
        values = {name: getattr(tensor, what) for name, tensor in named.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            advice = f"Bring all three to one {what} with .to(...)."
            if FP8 in values.values():
                advice = (
                    "Kernels read all three with 8 bits or none: quantise the others too, or "
                    "dequantise with .to(torch.bfloat16), times the descale."
                )
            raise InvalidInput(f"{what}s differ: {listed}. {advice}")
    if q.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedProblem(
            f"dtype {q.dtype}: neither a template nor PyTorch's attention takes it. "
            f"Convert q, k and v to one of {known}."
        )
    if message := _misfit(q.shape, k.shape, v.shape, layout):
        other = "bhsd" if layout == "bshd" else "bshd"
        fits = not _misfit(q.shape, k.shape, v.shape, other)
        hint = f" These shapes would fit layout={other!r}." if fits else ""
        raise InvalidInput(
            f"{message} Shapes in layout {layout!r}, {_SHAPES[layout]}: "
            f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}.{hint}"
        )
    for name, tensor in named.items():
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise InvalidInput(
                f"{name}'s last dimension has stride {tensor.stride(3)}, strides "
                f"{tuple(tensor.stride())}; kernels read rows of head_dim adjacent elements "
                f"(stride 1). Pass {name}.contiguous()."
            )
    _check_descales(q, k, descales, layout)


def check_tensors(q: object, k: object, v: object, descales: Sequence[object] = UNSCALED) -> None:
    """Refuse what is no tensor at all with InvalidInput."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, torch.Tensor):
            raise InvalidInput(f"{name} is a {type(value).__name__}; a torch.Tensor is needed.")
    for name, value in zip(_DESCALES, descales, strict=True):
        if value is not None and not isinstance(value, torch.Tensor):
            raise InvalidInput(
                f"{name}={value!r} is a {type(value).__name__}; a float32 torch.Tensor of shape "
                "(batch, num_kv_heads) is needed, or None for 1."
            )


_DESCALES = ("q_descale", "k_descale", "v_descale")


def _check_descales(q: torch.Tensor, k: torch.Tensor, descales: Descales, layout: str) -> None:
    b, _, h = LAYOUT_AXES[layout]
    wanted = (k.shape[b], k.shape[h])
    for name, descale in zip(_DESCALES, descales, strict=True):
        if descale is None:
            continue
        if q.dtype != FP8:
            raise InvalidInput(
                f"{name} is given, but q, k and v are {q.dtype}: descales belong to {FP8}. Leave "
                f"it out, or multiply {name[0]} by it."
            )
        if descale.dtype != torch.float32:
            raise InvalidInput(
                f"{name} is {descale.dtype}; torch.float32 is needed. Pass {name}.float()."
            )
        if tuple(descale.shape) != wanted:
            raise InvalidInput(
                f"{name} has shape {_shape(descale)}; (batch, num_kv_heads), here {wanted}, is "
                f"needed. One factor for all becomes that with {name}.expand{wanted}."
            )
        if descale.device != q.device:
            raise InvalidInput(
                f"{name} is on {descale.device}, q, k and v on {q.device}. "
                f"Pass {name}.to({str(q.device)!r})."
            )
        if descale.layout is not torch.strided or descale.is_nested:
            raise InvalidInput(f"{name} is sparse or nested; a dense tensor is needed.")


def _misfit(q: Sequence[int], k: Sequence[int], v: Sequence[int], layout: str) -> str | None:
    """Why three shapes of four dimensions do not make an attention call, or None."""
    b, s, h = LAYOUT_AXES[layout]
    if not q[b] == k[b] == v[b]:
        return f"batch differs: q {q[b]}, k {k[b]}, v {v[b]}."
    if k[s] != v[s]:
        return f"seqlen differs between k, {k[s]}, and v, {v[s]}."
    if k[h] != v[h]:
        return f"num_heads differs between k, {k[h]}, and v, {v[h]}."
    if min(q[h], k[h]) < 1:
        return f"num_heads is q {q[h]}, k {k[h]}; at least 1 is needed."
    if q[h] % k[h]:
        return (
            f"q has {q[h]} heads, k and v {k[h]}: each key/value head must serve the same number "
            f"of query heads, so q's must be a multiple."
        )
    if q[3] != k[3]:
        return f"head_dim differs between q, {q[3]}, and k, {k[3]}."
    if min(q[3], v[3]) < 1:
        return f"head_dim is q {q[3]}, v {v[3]}; at least 1 is needed."
    if max(*q, *k, *v) > _MOST:
        return f"a size is above {_MOST}."
    return None


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores from a scale in [SMALLEST_SCALE, LARGEST_SCALE].

    Kernels find a row's largest score before they scale, which is right for positive scales only,
    and PyTorch's do the same.
    """
    if scale < 0:
        q, scale = _negated(q), -scale
    return (q, scale) if scale >= SMALLEST_SCALE else (torch.zeros_like(q), 1.0)


def _negated(q: torch.Tensor) -> torch.Tensor:
    if q.dtype != FP8:
        return -q
    # PyTorch has no arithmetic of 8 bits. Sixteen hold them exactly, there and back.
    return (-q.to(torch.bfloat16)).to(FP8)


def no_kernel_for(q: torch.Tensor) -> str | None:
    """Why no Problem can be made of a call with this query, so that PyTorch serves; or None."""
    if q.device.type not in ("cpu", "cuda"):
        return (
            f"autoflash has no kernels for device type {q.device.type!r}: PyTorch serves. "
            "Move q, k and v to 'cuda' or 'cpu' to use it."
        )
    if dtype_name(q) not in ELEMENT_SIZES:
        return (
            f"no template takes dtype {dtype_name(q)}: PyTorch serves. Convert q, k and v to "
            f"one of {', '.join(ELEMENT_SIZES)} to use one."
        )
    return None


def problem_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    layout: str,
    window_size: object = None,
    softcap: object = 0.0,
) -> Problem:
    """The Problem of a call that `check` let through, of a dtype in ELEMENT_SIZES."""
    b, s, h = LAYOUT_AXES[layout]
    head_dim_v = v.shape[3]
    size = out_dtype(q.dtype).itemsize
    left, right = window_of(window_size)
    # Rows of the output are head_dim_v elements apart, whatever its layout.
    rows_aligned = head_dim_v * size % _ALIGNMENT == 0
    return Problem(
        dtype=dtype_name(q),
        batch=q.shape[b],
        seqlen_q=q.shape[s],
        seqlen_k=k.shape[s],
        num_heads=q.shape[h],
        num_kv_heads=k.shape[h],
        head_dim=q.shape[3],
        head_dim_v=head_dim_v,
        causal=causal,
        window_left=left,
        window_right=right,
        softcap=softcap_of(softcap),
        aligned=rows_aligned and all(is_aligned(tensor) for tensor in (q, k, v)),
    )


def dtype_name(tensor: torch.Tensor) -> str:
    """PyTorch's name of a tensor's dtype, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the output for q, k and v of `dtype`; see Problem.out_dtype."""
    return torch.bfloat16 if dtype == FP8 else dtype


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether base address and all strides but the last are multiples of 16 bytes."""
    size = tensor.element_size()
    return tensor.data_ptr() % _ALIGNMENT == 0 and all(
        stride * size % _ALIGNMENT == 0 for stride in tensor.stride()[:3]
    )
