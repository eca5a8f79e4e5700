"""A call, from tensors to launch: a dictionary lookup when one like it came before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _torch
from ._call import (
    AXES,
    FP8,
    LARGEST,
    SMALLEST_SCALE,
    Descales,
    Window,
    check,
    out_dtype,
    problem_of,
)
from ._load import NoLibrary, prepare, refusal
from ._table import Problem, choices, table

Result = Tensor | tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor, float | None, Descales, bool], Result]

_MOST_CALLS = 4096
_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_prepared: dict[Any, Run] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
) -> Result:
    """Exact attention, softmax(q @ k^T * softmax_scale + mask) @ v.

    causal=True and windows are aligned to the bottom right corner: query row i sees key row j where
    i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right, and right is 0 where
    causal. A row that sees no key gets out = 0 and lse = -inf. Query head h uses key/value head
    h // (num_heads / num_kv_heads). Calls that need gradients are served by PyTorch.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim) in layout "bshd"; the last stride is 1.
        k: (batch, seqlen_k, num_kv_heads, head_dim), dtype and device of q.
        v: (batch, seqlen_k, num_kv_heads, head_dim_v), likewise.
        causal: whether a row sees no key behind its own position.
        window_size: (left, right), None or -1 for no bound on a side; None: no window.
        softcap: scores become softcap * tanh(score / softcap); 0.0: off.
        softmax_scale: factor of the scores; None: 1 / sqrt(head_dim).
        q_descale: (batch, num_kv_heads) float32, factor of what is stored; only with
            float8_e4m3fn. None: 1.
        k_descale: likewise.
        v_descale: likewise.
        return_lse: whether to return (out, lse).
        layout: "bshd", or "bhsd" for (batch, num_heads, seqlen, head_dim); of out too.

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim_v), contiguous, dtype of q; bfloat16 where that
            has 8 bits. With return_lse, (out, lse): (batch, num_heads, seqlen_q) float32.

    Raises:
        ValueError: the arguments do not fit together.
    """
    descales = (q_descale, k_descale, v_descale)
    if _is_compiling() or _is_special(q, k, v):
        window, softcap = check(q, k, v, causal, window_size, softcap, descales, layout)
        if _is_compiling() and not _needs_gradients(q, k, v):
            left, right = (-1 if bound is None else bound for bound in window)
            out, lse = _op(
                q, k, v, causal, left, right, softcap, softmax_scale, *descales, layout
            )  # fmt: skip
            return (out, lse) if return_lse else out
        by_torch = _by_torch(q, causal, window, softcap, layout)
        return by_torch(q, k, v, softmax_scale, descales, return_lse)
    try:
        # The strides of a contiguous tensor follow from its shape, and asking is quicker.
        key: tuple[object, ...] = (
            q.shape, k.shape, v.shape,
            q.is_contiguous() or q.stride(),
            k.is_contiguous() or k.stride(),
            v.is_contiguous() or v.stride(),
            q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            causal, window_size, softcap, layout,
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
        )  # fmt: skip
        if q_descale is not None or k_descale is not None or v_descale is not None:
            key += tuple(d if d is None else (d.shape, d.dtype, d.device) for d in descales)
        run = _prepared.get(key)
    except TypeError:  # a window that is a list
        key, run = (), None
    if run is None:
        run = _choose(q, k, v, causal, window_size, softcap, descales, layout)
        if len(_prepared) >= _MOST_CALLS:
            _prepared.clear()
        if key:
            _prepared[key] = run
    return run(q, k, v, softmax_scale, descales, return_lse)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`attention` under the name and arguments of flash-attn 2, layout "bshd".

    Args:
        q: and the others as in `attention`.
        k: likewise.
        v: likewise.
        dropout_p: 0.0; kernels have no dropout.
        softmax_scale: as in `attention`.
        causal: likewise.
        window_size: likewise; (-1, -1) is none.
        softcap: likewise.
        alibi_slopes: None; kernels have no ALiBi.
        deterministic: forward kernels always are.
        return_attn_probs: whether to return (out, lse, None): probabilities are never stored.
        q_descale: as in `attention`.
        k_descale: likewise.
        v_descale: likewise.

    Raises:
        NotImplementedError: dropout or ALiBi is asked for.
        ValueError: as in `attention`.
    """
    if dropout_p or alibi_slopes is not None:
        raise NotImplementedError(
            f"dropout_p={dropout_p}, alibi_slopes={'None' if alibi_slopes is None else 'given'}: "
            "these kernels have neither. Use 0.0 and None (at inference dropout is 0)."
        )
    found = attention(
        q, k, v, causal=causal, window_size=window_size, softcap=softcap,
        softmax_scale=softmax_scale, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale, return_lse=return_attn_probs,
    )  # fmt: skip
    return (*found, None) if isinstance(found, tuple) else found


def _is_special(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether something that no kernel knows of has a say: gradients, fake or other tensors."""
    if _needs_gradients(q, k, v):
        _warn_once("it has no backward kernels", "a call that needs gradients")
        return True
    return not (type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN)


def _needs_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (q.requires_grad or k.requires_grad or v.requires_grad) and _is_grad_enabled()


# To torch.compile a call is one operator. Its name begins with that of this package.
@torch.library.custom_op(
    f"{__name__.replace('.', '_')}::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, bool causal, int left, int right, float softcap, "
    "float? softmax_scale, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, str layout) "
    "-> (Tensor, Tensor)",
)
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    softmax_scale: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor]:
    out, lse = attention(
        q, k, v, causal=causal, window_size=(left, right), softcap=softcap,
        softmax_scale=softmax_scale, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale, return_lse=True, layout=layout,
    )  # fmt: skip
    return out, lse


@_op.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    b, s, h = AXES[options[-1]]
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=out_dtype(q))
    return out, q.new_empty((q.shape[b], q.shape[h], q.shape[s]), dtype=torch.float32)


# The first call of a kind -----------------------------------------------------------------------


def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: Any,
    softcap: float,
    descales: Descales,
    layout: str,
) -> Run:
    window, softcap = check(q, k, v, causal, window_size, softcap, descales, layout)
    otherwise = _by_torch(q, causal, window, softcap, layout)
    problem = problem_of(q, k, v, causal, window, softcap, layout)
    if 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return otherwise
    reason = refusal(q.device)
    if reason is None:
        for _, name in choices(problem):
            try:
                return _by_kernel(name, q, k, v, problem, layout, otherwise)
            except NoLibrary as error:
                reason = str(error)
        reason = reason or "nothing near it was tuned and exported"
    _warn_once(reason, f"attention of {q.dtype} with head_dim {q.shape[3]}")
    return otherwise


def _by_kernel(
    name: str, q: Tensor, k: Tensor, v: Tensor, problem: Problem, layout: str, otherwise: Run
) -> Run:
    """A kernel's launch with all that these shapes and strides decide."""
    b, s, h = AXES[layout]
    shape, device = (*q.shape[:3], v.shape[3]), q.device
    dtype = out_dtype(q)
    strides = torch.empty(shape, device="meta").stride()
    left = problem.seqlen_k if problem.window_left is None else problem.window_left
    right = problem.seqlen_q if problem.window_right is None else problem.window_right
    scalars: list[float] = [problem.batch, problem.seqlen_q, problem.seqlen_k]
    scalars += [problem.num_heads, problem.num_kv_heads, left, 0 if problem.causal else right]
    for stride in (q.stride(), k.stride(), v.stride(), strides):
        scalars += [stride[b], stride[s], stride[h]]
    bind = prepare(name, device.index or 0)
    launch = bind([*scalars, problem.softcap])
    lse_shape = (problem.batch, problem.num_heads, problem.seqlen_q)
    scaled, default_scale = q.dtype == FP8, 1.0 / math.sqrt(q.shape[3])
    elsewhere = device.type == "cuda" and torch.cuda.device_count() > 1

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None,
        descales: Descales,
        return_lse: bool,
    ) -> Result:
        if elsewhere and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return run(q, k, v, softmax_scale, descales, return_lse)
        if softmax_scale is None:
            softmax_scale = default_scale
        elif not SMALLEST_SCALE <= softmax_scale <= LARGEST:
            # Kernels look for a row's largest score before they scale it.
            return otherwise(q, k, v, softmax_scale, descales, return_lse)
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        lse = None
        if return_lse:
            lse = torch.empty(lse_shape, dtype=torch.float32, device=device)
        if scaled:
            factors = [d if d is None else d.contiguous() for d in descales]
            launch((q, k, v, out, lse, *factors), softmax_scale)
        else:
            launch((q, k, v, out, lse), softmax_scale)
        return out if lse is None else (out, lse)

    return run


def _by_torch(q: Tensor, causal: bool, window: Window, softcap: float, layout: str) -> Run:
    default_scale = 1.0 / math.sqrt(q.shape[3])

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None,
        descales: Descales,
        return_lse: bool,
    ) -> Result:
        out, lse = _torch.attention(
            q, k, v, causal=causal, window=window, softcap=softcap,
            scale=default_scale if softmax_scale is None else softmax_scale,
            descales=descales, layout=layout, return_lse=return_lse,
        )  # fmt: skip
        return out if lse is None else (out, lse)

    return run


@cache
def _warn_once(reason: str, what: str) -> None:
    warnings.warn(
        f"PyTorch serves {what}, not {__package__}: {reason}. (Said once; made for "
        f"{table()['header']['device']['name']}.)",
        stacklevel=4,
    )
