"""The public operation: what a model calls, above autograd, autocast and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from autoflash.runtime import fallback, library, request, serving, warn

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
    softmax_scale: float | None = None,
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

    Gradients are those of PyTorch: a call that needs them is served by PyTorch's own attention,
    with one warning. So is, with one warning for each reason, what no template supports here.

    Args:
        q: queries, (batch, seqlen_q, num_heads, head_dim) in layout "bshd". float16, bfloat16 or
            float32; float64 by PyTorch. Any strides, but the last must be 1.
        k: keys, (batch, seqlen_k, num_kv_heads, head_dim); dtype and device of q.
        v: values, (batch, seqlen_k, num_kv_heads, head_dim_v); dtype and device of q.
        causal: whether a query sees only keys up to its own position, as drawn above.
        softmax_scale: factor of the scores; None means 1/sqrt(head_dim).
        return_lse: whether to return the lse too.
        layout: order of the dimensions of q, k, v and out: "bshd" as above, or "bhsd":
            (batch, num_heads, seqlen, head_dim).

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim_v) in layout "bshd", contiguous, dtype of q.
        lse: only with return_lse=True, then (out, lse). (batch, num_heads, seqlen_q) in either
            layout, float32: natural logarithm of the sum over the keys a row sees of
            exp(score * softmax_scale).

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
        return _in_context(q, k, v, causal, softmax_scale, return_lse, layout)
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
                causal, layout, (q_address | k_address | v_address) & 15,
            ))  # fmt: skip
        except (RuntimeError, TypeError):  # no storage; unhashable layout
            run = None
        if run is not None:
            return run(q, k, v, q_address, k_address, v_address, None, return_lse)
    return serving.call(q, k, v, causal, softmax_scale, return_lse, layout)


def _in_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    return_lse: bool,
    layout: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """A call that something above the kernels has a say in: compiling, autocast, gradients."""
    request.check_tensors(q, k, v)
    if is_compiling() or _any_autocast():
        q, k, v = _autocast(q, k, v)
    if _needs_gradients(q, k, v):
        return _with_gradients(q, k, v, causal, softmax_scale, return_lse, layout)
    if is_compiling() or _dispatch_modes() or not (_is_plain(q) and _is_plain(k) and _is_plain(v)):
        out, lse = library.fwd(q, k, v, causal, softmax_scale, return_lse, layout)
        return (out, lse) if return_lse else out
    return serving.call(q, k, v, causal, softmax_scale, return_lse, layout)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast makes of the arguments of a matrix product; it leaves float64 alone."""
    kind = q.device.type
    # Of these two kinds only: Dynamo of PyTorch 2.11 cannot trace whether others have autocast.
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        fixed = tensor.dtype in (dtype, torch.float64) or not tensor.is_floating_point()
        return tensor if fixed else tensor.to(dtype)

    return cast(q), cast(k), cast(v)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no more than its data, as opposed to a fake or a distributed one."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _needs_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    if is_compiling() or forward_ad._current_level == -1:
        return False
    duals = (forward_ad.unpack_dual(tensor) for tensor in (q, k, v))  # type: ignore[no-untyped-call]
    return any(dual.tangent is not None for dual in duals)


def _with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    return_lse: bool,
    layout: str,
) -> Tensor | tuple[Tensor, Tensor]:
    if not is_compiling():  # a warning would break the graph
        request.check(q, k, v, causal=causal, layout=layout)
        warn.once(
            "autoflash has no backward kernels yet: PyTorch serves attention that needs gradients. "
            "Call it under torch.no_grad() or torch.inference_mode() for inference."
        )
    if softmax_scale is None:
        softmax_scale = request.default_scale(q.shape[3])
    q, scale = request.positive_scale(q, request.scale_of(softmax_scale))
    out, lse = fallback.attention(
        q, k, v, causal=causal, softmax_scale=scale, return_lse=return_lse, layout=layout
    )
    return out if lse is None else (out, lse)
