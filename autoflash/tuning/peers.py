"""What could a user run instead of autoflash, and what keeps it from running here?"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from autoflash.device import Device
from autoflash.errors import UnknownName
from autoflash.problem import FOREIGN_OPS, OP_OF_DTYPE, Problem
from autoflash.tuning.formula import descaled, hidden, naive, visible

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Call = Callable[[], "torch.Tensor"]
Descales = Sequence["torch.Tensor | None"]
Make = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", Problem], Call]
MakeScaled = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", Problem, Descales], Call]
"""Of a peer that takes inputs of 8 bits: their descales come last."""
Refusal = Callable[[Problem, Device], str | None]

_HALF = ("float16", "bfloat16")
_FP8 = "float8_e4m3fn"
_SCORES_LIMIT = {"cpu": 2 << 30, "cuda": 16 << 30}
"""Most bytes that a peer which stores the scores may take for them."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another implementation of attention.

    Attributes:
        name: as in tables and records.
        what: which one it is.
        layout: of what its calls return, "bshd" or "bhsd".
        is_fused: whether it is meant to run without storing the scores; one that is then far slower
            than the others has fallen back to something else, and its time says nothing about it.
        builds_with_triton: whether its first call compiles kernels of PyTorch's own making for so
            long that a comparison does it ahead.
    """

    name: str
    what: str
    layout: str
    is_fused: bool
    builds_with_triton: bool
    _refusal: Refusal
    _make: Make
    _make_scaled: MakeScaled | None = None  # None: it takes no inputs of 8 bits

    def unavailable(self, problem: Problem, device: Device) -> str | None:
        """Why it cannot run `problem` on `device`, as far as can be told before trying."""
        return self._refusal(problem, device)

    def make(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        problem: Problem,
        descales: Descales = (),
    ) -> Callable[[], torch.Tensor]:
        """Prepare a call: inputs copied to the layout it is made for, masks built.

        Args:
            q: (batch, seqlen_q, num_heads, head_dim).
            k: (batch, seqlen_k, num_kv_heads, head_dim).
            v: (batch, seqlen_k, num_kv_heads, head_dim_v).
            problem: what is asked.
            descales: of q, k and v, (batch, num_kv_heads) each, where they have 8 bits.

        Returns:
            A callable without arguments that computes and returns out, in `layout`. The first call
            may compile, and may raise whatever the implementation raises for what it cannot do.
        """
        if self.layout == "bhsd":
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if self._make_scaled is not None and problem.dtype == _FP8:
            return self._make_scaled(q, k, v, problem, descales)
        return self._make(q, k, v, problem)


def available(
    problem: Problem,
    device: Device,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    names: Iterable[str] | None = None,
    descales: Descales = (),
) -> tuple[dict[str, Call], dict[str, str]]:
    """Prepare the peers that can run a problem, each run once to make sure.

    Args:
        problem: what is asked.
        device: where q, k and v lie.
        q: (batch, seqlen_q, num_heads, head_dim).
        k: (batch, seqlen_k, num_kv_heads, head_dim).
        v: (batch, seqlen_k, num_kv_heads, head_dim_v).
        names: which; None means all.
        descales: of q, k and v, where they have 8 bits.

    Returns:
        name -> call, and name -> why not, for each of the names.

    Raises:
        UnknownName: a name is not in PEERS.
    """
    import torch

    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for name in PEERS if names is None else names:
        peer = get(name)
        reason = peer.unavailable(problem, device)
        if reason is not None:
            reasons[name] = reason
            continue
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # PyTorch explains in warnings, then raises
                call = peer.make(q, k, v, problem, descales)
                call()
                if device.is_cuda:
                    torch.cuda.synchronize()
        except Exception as error:
            reasons[name] = first_line(error)
        else:
            calls[name] = call
    return calls, reasons


def get(name: str) -> Peer:
    """The peer of that name, or UnknownName."""
    if name not in PEERS:
        raise UnknownName.of("peer", name, PEERS)
    return PEERS[name]


def first_line(error: Exception) -> str:
    """What an error is and the beginning of what it says, for a reason in a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _scale(problem: Problem) -> float:
    return 1.0 / math.sqrt(problem.head_dim)


def _is_masked(problem: Problem) -> bool:
    """Whether the causal mask hides anything: not of one row, which is aligned bottom-right."""
    return problem.causal and problem.seqlen_q > 1


def _window(problem: Problem, unbounded: T) -> tuple[int | T, int | T]:
    """How far a row sees to both sides; a causal row sees 0 ahead.

    Args:
        problem: whose mask it is.
        unbounded: what stands for a side that is not bounded.
    """
    left = unbounded if problem.window_left is None else problem.window_left
    if problem.causal:
        return left, 0
    return left, unbounded if problem.window_right is None else problem.window_right


# PyTorch ----------------------------------------------------------------------------------------


def _sdpa(backend: str | None) -> Make:
    """scaled_dot_product_attention, restricted to one backend or as PyTorch chooses."""

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Call:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right

        masked = _is_masked(problem) and not problem.local
        square = problem.seqlen_q == problem.seqlen_k
        mask: torch.Tensor | None = None
        if problem.local:
            mask = _seen(problem, q.device)
        elif masked and not square:  # is_causal is aligned top-left
            mask = causal_lower_right(problem.seqlen_q, problem.seqlen_k)
            if not q.is_cuda or backend in ("MATH", "CUDNN_ATTENTION"):
                shape = (problem.seqlen_q, problem.seqlen_k)
                ones = torch.ones(shape, dtype=torch.bool, device=q.device)
                mask = ones.tril(problem.seqlen_k - problem.seqlen_q)
        scale, gqa = _scale(problem), problem.group_size > 1

        def call() -> torch.Tensor:
            out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=masked and square, scale=scale, enable_gqa=gqa
            )
            return out

        if backend is None:
            return call
        only = SDPBackend.__members__[backend]

        def restricted() -> torch.Tensor:
            with sdpa_kernel(only):
                return call()

        return restricted

    return make


def _seen(problem: Problem, device: torch.device) -> torch.Tensor:
    """The mask as a matrix: true where a row sees a key."""
    import torch

    p = problem
    rows = torch.arange(p.seqlen_q, device=device)
    seen = visible(rows, p.seqlen_q, p.seqlen_k, p.causal, p.window_left, p.window_right)
    return ~hidden(seen, p.seqlen_k)


def _make_naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Call:
    scale, masked = _scale(problem), _is_masked(problem)
    left, right, softcap = problem.window_left, problem.window_right, problem.softcap
    return lambda: naive(
        q, k, v, causal=masked, softmax_scale=scale, window_left=left, window_right=right,
        softcap=softcap,
    )  # fmt: skip


def _make_naive_scaled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, descales: Descales
) -> Call:
    """The formula on what inputs of 8 bits mean; making that of them is part of each call."""
    import torch

    dtype = getattr(torch, problem.out_dtype)

    def call() -> torch.Tensor:
        tensors = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        wide = [tensor.transpose(1, 2) for tensor in descaled(tensors, descales, dtype)]
        return _make_naive(wide[0], wide[1], wide[2], problem)()

    return call


def _make_flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    problem: Problem,
    mode: str | None = "max-autotune-no-cudagraphs",
) -> Call:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Compiled anew for each problem. Without this a fifth shape in one process ran unfused, at 4 to
    # 30 TFLOPS instead of 250 to 470 on an H200 (2026-11-21): the recompile limit.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    _quiet_inductor()
    compiled: Any = torch.compile(flex_attention, dynamic=False, mode=mode)
    offset, softcap = problem.seqlen_k - problem.seqlen_q, problem.softcap
    far = problem.seqlen_q + problem.seqlen_k
    left, right = _window(problem, far)

    def sees(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        after = key - row - offset  # how far a key is beyond the row's own place
        return after <= right if left == far else (after >= -left) & (after <= right)

    def capped(
        score: torch.Tensor,
        batch: torch.Tensor,
        head: torch.Tensor,
        row: torch.Tensor,
        key: torch.Tensor,
    ) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    block_mask = None
    if _is_masked(problem) or problem.local:
        size = (problem.seqlen_q, problem.seqlen_k)
        block_mask = create_block_mask(sees, None, None, *size, device=q.device)
    options: dict[str, Any] = {"scale": _scale(problem), "enable_gqa": problem.group_size > 1}
    if problem.softcapped:
        options["score_mod"] = capped

    def call() -> torch.Tensor:
        out: torch.Tensor = compiled(q, k, v, block_mask=block_mask, **options)
        return out

    return call


def _make_flex_default(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Call:
    """As tuned FlexAttention is run: on views of what lies as models have it."""
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    call = _make_flex(heads_first[0], heads_first[1], heads_first[2], problem, mode=None)
    return lambda: call().transpose(1, 2)


def _quiet_inductor() -> None:
    """No report of each autotuned choice on standard error: forty lines per problem."""
    config: Any = importlib.import_module("torch._inductor.config")
    if hasattr(config, "max_autotune_report_choices_stats"):
        config.max_autotune_report_choices_stats = False
    selection: Any = importlib.import_module("torch._inductor.select_algorithm")
    selection.PRINT_AUTOTUNE = False


# Packages ---------------------------------------------------------------------------------------


def _flash_attn(module: str, unbounded: int | None = -1) -> Make:
    """flash_attn_func of a module: FlashAttention 2, 3 and 4 agree in what is used here.

    Args:
        module: where it is.
        unbounded: what stands for an unbounded side of a window.
    """

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Call:
        return _flash_attn_call(module, unbounded, q, k, v, problem, {})

    return make


def _flash_attn3_scaled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, descales: Descales
) -> Call:
    """FlashAttention 3 takes inputs of 8 bits, and descales as ours are."""
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=False))
    return _flash_attn_call("flash_attn_interface", -1, q, k, v, problem, named)


def _flash_attn_call(
    module: str,
    unbounded: int | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    problem: Problem,
    options: dict[str, Any],
) -> Call:
    function = importlib.import_module(module).flash_attn_func
    options = {"softmax_scale": _scale(problem), "causal": problem.causal, **options}
    if problem.local:
        options["window_size"] = _window(problem, unbounded)
    if problem.softcapped:
        options["softcap"] = problem.softcap

    def call() -> torch.Tensor:
        out: Any = function(q, k, v, **options)
        first: torch.Tensor = out[0] if isinstance(out, tuple) else out  # 4 and older 3: lse too
        return first

    return call


@cache
def _import_failure(module: str, package: str) -> str | None:
    """Why a module cannot be imported: importing is the only sure test of a compiled extension."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module == missing or module.startswith(f"{missing}."):
            return f"package {package} is not installed"
        return f"package {package} needs module {missing}, which is not installed"
    except Exception as error:
        return f"package {package} cannot be imported: {first_line(error)}"
    return None


# What keeps a peer from running -----------------------------------------------------------------


def _refuse(*tests: Refusal) -> Refusal:
    """The first reason that any of the tests gives."""

    def refusal(problem: Problem, device: Device) -> str | None:
        return next((why for test in tests if (why := test(problem, device))), None)

    return refusal


def _only_gpu(problem: Problem, device: Device) -> str | None:
    return None if device.is_cuda else "runs on GPUs only"


def _only_half(problem: Problem, device: Device) -> str | None:
    return None if problem.dtype in _HALF else f"has no {problem.dtype}, only {', '.join(_HALF)}"


def _only_forward(problem: Problem, device: Device) -> str | None:
    forward = problem.op in ("fwd", *OP_OF_DTYPE.values(), *FOREIGN_OPS)
    return None if forward else f"op {problem.op} is not compared"


def _only_flex(problem: Problem, device: Device) -> str | None:
    return None if problem.op == "flex" else "is compared on problems of op flex"


def _not_8_bits(problem: Problem, device: Device) -> str | None:
    return f"takes no {problem.dtype}" if problem.dtype == _FP8 else None


def _half_or_fp8(problem: Problem, device: Device) -> str | None:
    return None if problem.dtype == _FP8 else _only_half(problem, device)


def _no_window(problem: Problem, device: Device) -> str | None:
    return "has no sliding window in PyTorch" if problem.local else None


def _no_softcap(problem: Problem, device: Device) -> str | None:
    return "has no softcap in PyTorch" if problem.softcapped else None


def _not_empty(problem: Problem, device: Device) -> str | None:
    empty = not (problem.batch and problem.seqlen_q and problem.seqlen_k)
    return "not defined without rows or keys" if empty else None


def _arch_from(capability: int) -> Refusal:
    def test(problem: Problem, device: Device) -> str | None:
        if device.capability >= capability:
            return None
        return f"needs sm{capability} or newer, this is {device.arch}"

    return test


def _arch_of(*generations: int) -> Refusal:
    def test(problem: Problem, device: Device) -> str | None:
        if device.capability // 10 in generations:
            return None
        return f"has kernels for sm{'x, sm'.join(map(str, generations))}x, this is {device.arch}"

    return test


def _dim_up_to(limit: int) -> Refusal:
    def test(problem: Problem, device: Device) -> str | None:
        dim = max(problem.head_dim, problem.head_dim_v)
        return None if dim <= limit else f"head_dim {dim} is over its {limit}"

    return test


def _dim_multiple_of_8(problem: Problem, device: Device) -> str | None:
    dims = (problem.head_dim, problem.head_dim_v)
    return None if not any(d % 8 for d in dims) else f"head_dim {dims[0]} is no multiple of 8"


def _no_empty_rows(problem: Problem, device: Device) -> str | None:
    # Seen on an H200 with torch 2.11 and cuDNN 9.19, 2026-11-21.
    bounded = problem.causal or problem.window_right is not None
    if bounded and problem.seqlen_q > problem.seqlen_k:
        return "is wrong where rows see no key (causal, seqlen_q > seqlen_k)"
    return None


def _no_empty_rows_by_matrix(problem: Problem, device: Device) -> str | None:
    """PyTorch's choice for a mask that is a matrix is, on a GPU, the kernel that is wrong then."""
    return _no_empty_rows(problem, device) if problem.local and device.is_cuda else None


def _same_dims(problem: Problem, device: Device) -> str | None:
    if problem.head_dim == problem.head_dim_v:
        return None
    return f"head_dim_v {problem.head_dim_v} must equal head_dim {problem.head_dim}"


def _scores_fit(problem: Problem, device: Device) -> str | None:
    # Scores before and after the softmax, in the problem's dtype and while it runs in float32.
    rows = problem.batch * problem.num_heads * problem.seqlen_q
    size = rows * problem.seqlen_k * (problem.element_size + 4)
    limit = _SCORES_LIMIT["cuda" if device.is_cuda else "cpu"]
    if size <= limit:
        return None
    return f"would store {size / 2**30:.1f} GiB of scores, more than {limit / 2**30:.0f}"


def _mask_fits(problem: Problem, device: Device) -> str | None:
    # One byte of a matrix of truths, then as many as a score has where it is made a bias.
    size = problem.seqlen_q * problem.seqlen_k * (1 + problem.element_size)
    limit = _SCORES_LIMIT["cuda" if device.is_cuda else "cpu"]
    if not problem.local or size <= limit:
        return None
    return f"would store a mask of {size / 2**30:.1f} GiB, more than {limit / 2**30:.0f}"


def _installed(module: str, package: str) -> Refusal:
    return lambda problem, device: _import_failure(module, package)


def _peer(
    name: str,
    what: str,
    layout: str,
    make: Make,
    *tests: Refusal,
    is_fused: bool = True,
    builds_with_triton: bool = False,
    make_scaled: MakeScaled | None = None,
) -> Peer:
    eight_bits = () if make_scaled else (_not_8_bits,)
    refusal = _refuse(_only_forward, _not_empty, *eight_bits, *tests)
    return Peer(name, what, layout, is_fused, builds_with_triton, refusal, make, make_scaled)


PEERS = {
    peer.name: peer
    for peer in (
        _peer("sdpa", "PyTorch's scaled_dot_product_attention, its own choice", "bhsd",
              _sdpa(None), _no_softcap, _mask_fits, _no_empty_rows_by_matrix, is_fused=False),
        _peer("cudnn", "cuDNN through PyTorch", "bhsd", _sdpa("CUDNN_ATTENTION"),
              _only_gpu, _no_softcap, _no_window, _only_half, _arch_from(80), _dim_up_to(256),
              _dim_multiple_of_8, _no_empty_rows),
        _peer("fa2", "FlashAttention-2 through PyTorch", "bhsd", _sdpa("FLASH_ATTENTION"),
              _only_gpu, _no_softcap, _no_window, _only_half, _arch_from(80), _same_dims,
              _dim_up_to(256)),
        _peer("efficient", "memory-efficient attention through PyTorch", "bhsd",
              _sdpa("EFFICIENT_ATTENTION"), _only_gpu, _no_softcap, _mask_fits, _no_empty_rows),
        _peer("math", "PyTorch's formula", "bhsd", _sdpa("MATH"), _no_softcap, _scores_fit,
              is_fused=False),
        _peer("flex", "FlexAttention, max-autotune", "bhsd", _make_flex, _only_gpu,
              builds_with_triton=True),
        _peer("flex_default", "FlexAttention as torch.compile makes it without options", "bshd",
              _make_flex_default, _only_flex, builds_with_triton=True),
        _peer("flash_attn2", "package flash-attn 2", "bshd",
              _flash_attn("flash_attn.flash_attn_interface"), _only_gpu, _only_half,
              _arch_from(80), _same_dims, _dim_up_to(256),
              _installed("flash_attn.flash_attn_interface", "flash-attn")),
        _peer("flash_attn3", "package flash-attn 3", "bshd", _flash_attn("flash_attn_interface"),
              _only_gpu, _half_or_fp8, _arch_of(8, 9), _dim_up_to(256),
              _installed("flash_attn_interface", "flash-attn-3"),
              make_scaled=_flash_attn3_scaled),
        _peer("fa4", "package flash-attn-4", "bshd", _flash_attn("flash_attn.cute", None),
              _only_gpu, _only_half, _arch_from(80), _dim_multiple_of_8, _dim_up_to(256),
              _installed("flash_attn.cute", "flash-attn-4")),
        _peer("naive", "the formula in PyTorch operations", "bhsd", _make_naive, _scores_fit,
              is_fused=False, make_scaled=_make_naive_scaled),
    )
}  # fmt: skip
"""Every peer, by the name used in tables and records."""

TORCH_PEERS = ("sdpa", "cudnn", "fa2", "efficient", "math")
"""What PyTorch alone offers without compiling: what a tuned kernel has to beat to be of use."""
