"""The public operation: what a model calls, above autograd, autocast and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from autoflash.runtime import fallback, library, options, request, serving, warn
from autoflash.runtime.request import Descales

# Private, present since PyTorch 2.4; the public calls take five times as long.
_any_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
_prepared = serving.prepared


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(q @ k^T * softmax_scale + mask) @ v, by the fastest kernel known.

    The first call of a kind chooses a kernel and builds it, which is quick where it was built
    before (`autoflash.warmup` does it ahead); later calls look it up. It never tunes.

    Grouped-query attention: k and v may have fewer heads than q, if num_heads is a multiple of
    num_kv_heads. Query head h uses key/value head h // (num_heads / num_kv_heads): with 6 and 2,
    query heads 0, 1, 2 use key/value head 0, and 3, 4, 5 use head 1.

    causal=True is aligned to the bottom right corner: query row i sees key row j where
    j <= i + seqlen_k - seqlen_q. For seqlen_q = 2, seqlen_k = 5 (1 = sees, 0 = does not):

        1 1 1 1 0
        1 1 1 1 1

    and for seqlen_q = 5, seqlen_k = 2:

        0 0
        0 0
        0 0
        1 0
        1 1

    A row that sees no key (all zeros, or seqlen_k = 0) gets out = 0 and lse = -inf.

    window_size=(left, right) lets a query see at most `left` keys before its own position and
    `right` after it: row i sees key row j where
    i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right. For (1, 0), which
    says the same with causal=True and without, and for (1, 2), seqlen_q = 4, seqlen_k = 6:

        0 1 1 0 0 0        0 1 1 1 1 0
        0 0 1 1 0 0        0 0 1 1 1 1
        0 0 0 1 1 0        0 0 0 1 1 1
        0 0 0 0 1 1        0 0 0 0 1 1

    None (or -1) is no bound on that side. causal=True bounds the right side by 0 whatever
    `right` says.

    softcap > 0 keeps scores between -softcap and softcap: they become
    softcap * tanh(q @ k^T * softmax_scale / softcap), before the mask.

    With float8_e4m3fn, q, k and v stand for what is stored times their descales, one for each
    sequence and key/value head; those of q are shared by the query heads of a key/value head.

    Gradients are those of PyTorch: a call that needs them is served by PyTorch's own attention,
    with one warning. So is, with one warning for each reason, what no template supports here.

    Args:
        q: queries, (batch, seqlen_q, num_heads, head_dim) in layout "bshd". float16, bfloat16 or
            float32; float64 by PyTorch; float8_e4m3fn with bfloat16 output. Any strides, but the
            last must be 1.
        k: keys, (batch, seqlen_k, num_kv_heads, head_dim); dtype and device of q.
        v: values, (batch, seqlen_k, num_kv_heads, head_dim_v); dtype and device of q.
        causal: whether a query sees only keys up to its own position, as drawn above.
        window_size: (left, right), as drawn above, each a whole number from 0 up, or None or -1
            for no bound; None means no window.
        softcap: bound of the scores, as above; 0.0 means none.
        softmax_scale: factor of the scores; None means 1/sqrt(head_dim).
        q_descale: (batch, num_kv_heads), float32; only with float8_e4m3fn. None means 1.
        k_descale: likewise.
        v_descale: likewise.
        return_lse: whether to return the lse too.
        layout: order of the dimensions of q, k, v and out: "bshd" as above, or "bhsd":
            (batch, num_heads, seqlen, head_dim).

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim_v) in layout "bshd", contiguous, dtype of q;
            bfloat16 where that is float8_e4m3fn.
        lse: only with return_lse=True, then (out, lse). (batch, num_heads, seqlen_q) in either
            layout, float32: natural logarithm of the sum over the keys a row sees of
            exp(score), of scores that are scaled and capped.

    Raises:
        InvalidInput: shapes, dtypes, devices, strides or options cannot be meant; it is a
            ValueError and names the value, the limit and what to do.
        UnsupportedProblem: neither a template nor PyTorch can serve the call here.

    Source:
        FlashAttention-2, arXiv 2307.08691, section 3.1, for the algorithm and the lse; each
        template names the paper of its kernel.
    """
    if is_compiling() or not (
        type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and not _dispatch_modes()
        and not _any_autocast()
        and forward_ad._current_level == -1
        and not ((q.requires_grad or k.requires_grad or v.requires_grad) and _is_grad_enabled())
    ):
        return _in_context(
            q, k, v, causal, window_size, softcap, softmax_scale,
            (q_descale, k_descale, v_descale), return_lse, layout,
        )  # fmt: skip
    if q_descale is not None or k_descale is not None or v_descale is not None:
        return _scaled(
            q, k, v, causal, window_size, softcap, softmax_scale,
            (q_descale, k_descale, v_descale), return_lse, layout,
        )  # fmt: skip
    if softmax_scale is None:
        # The hit of serving.call, here once more: a Python call less is 0.1 us of about 3.5.
        try:
            q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
            run = _prepared.get((
                q.shape, k.shape, v.shape,
                q.is_contiguous() or q.stride(),
                k.is_contiguous() or k.stride(),
                v.is_contiguous() or v.stride(),
                q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
                causal, window_size, softcap, layout, (q_address | k_address | v_address) & 15,
            ))  # fmt: skip
        except (RuntimeError, TypeError):  # no storage; unhashable option
            run = None
        if run is not None:
            return run(q, k, v, q_address, k_address, v_address, None, return_lse)
    return serving.call(
        q, k, v, causal, window_size, softcap, softmax_scale, None, return_lse, layout
    )


def _scaled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: object,
    softcap: float,
    softmax_scale: float | None,
    descales: Descales,
    return_lse: bool,
    layout: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """A call with descales, where nothing about q, k and v needs `_in_context`."""
    plain = True
    for descale in descales:
        if descale is not None and (
            type(descale) is not Tensor or (descale.requires_grad and _is_grad_enabled())
        ):
            plain = False
    serve = serving.call if plain else _in_context
    return serve(q, k, v, causal, window_size, softcap, softmax_scale, descales, return_lse, layout)


def _in_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: object,
    softcap: float,
    softmax_scale: float | None,
    descales: Descales,
    return_lse: bool,
    layout: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """A call that something above the kernels has a say in: compiling, autocast, gradients."""
    request.check_tensors(q, k, v, descales)
    if is_compiling() or _any_autocast():
        q, k, v = _autocast(q, k, v)
    given = [q, k, v, *[descale for descale in descales if descale is not None]]
    if _needs_gradients(given):
        return _with_gradients(
            q, k, v, causal, window_size, softcap, softmax_scale, descales, return_lse, layout
        )
    if is_compiling() or _dispatch_modes() or not all(map(_is_plain, given)):
        left, right = options.window_of(window_size)
        cap = options.softcap_of(softcap)
        out, lse = library.fwd(
            q, k, v, causal, softmax_scale, return_lse, layout, left, right, cap, *descales
        )
        return (out, lse) if return_lse else out
    some = descales if len(given) > 3 else None
    return serving.call(
        q, k, v, causal, window_size, softcap, softmax_scale, some, return_lse, layout
    )


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast makes of the arguments of a matrix product; it leaves float64 alone.

    So is what has 8 bits: who quantised it wants products of that.
    """
    kind = q.device.type
    # Of these two kinds only: Dynamo of PyTorch 2.11 cannot trace whether others have autocast.
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        kept = (dtype, torch.float64, request.FP8)
        fixed = tensor.dtype in kept or not tensor.is_floating_point()
        return tensor if fixed else tensor.to(dtype)

    return cast(q), cast(k), cast(v)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no more than its data, as opposed to a fake or a distributed one."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _needs_gradients(given: list[Tensor]) -> bool:
    if _is_grad_enabled() and any([tensor.requires_grad for tensor in given]):
        return True
    if is_compiling() or forward_ad._current_level == -1:
        return False
    duals = (forward_ad.unpack_dual(tensor) for tensor in given)  # type: ignore[no-untyped-call]
    return any(dual.tangent is not None for dual in duals)


def _with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window_size: object,
    softcap: float,
    softmax_scale: float | None,
    descales: Descales,
    return_lse: bool,
    layout: str,
) -> Tensor | tuple[Tensor, Tensor]:
    window, cap = options.window_of(window_size), options.softcap_of(softcap)
    if not is_compiling():  # a warning would break the graph
        request.check(q, k, v, causal=causal, layout=layout, descales=descales)
        warn.once(
            "autoflash has no backward kernels yet: PyTorch serves attention that needs gradients. "
            "Call it under torch.no_grad() or torch.inference_mode() for inference."
        )
    if softmax_scale is None:
        softmax_scale = options.default_scale(q.shape[3])
    q, scale = request.positive_scale(q, options.scale_of(softmax_scale))
    if is_compiling() and not fallback.is_traceable(
        q, k, causal=causal, window=window, softcap=cap, return_lse=return_lse, layout=layout
    ):
        out, lse = library.fwd_by_torch(
            q, k, v, *descales, causal, *window, cap, scale, return_lse, layout
        )
        return (out, lse) if return_lse else out
    out, lse = fallback.attention(
        q, k, v, causal=causal, window=window, softcap=cap, softmax_scale=scale,
        descales=descales, return_lse=return_lse, layout=layout,
    )  # fmt: skip
    return out if lse is None else (out, lse)
