"""The argument list of each op, once: C parameters, Triton signature and launch scalars agree.

Every kernel of an op takes the same arguments in the same order, whatever its language: pointers
to tensors, a pointer to its workspace, then sizes, strides (in elements) and the cap of scores,
which are bound when a kernel is prepared for a shape, then `softmax_scale`, then one word that
depends on where it runs (`stream` on a GPU, `num_threads` on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoflash.errors import UnknownName
from autoflash.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a kernel.

    Attributes:
        name: as templates use it.
        kind: "input" (pointer to the problem's dtype), "output" (to its out_dtype),
            "input_float32" or "output_float32" (pointers that may be null), "workspace" (to memory
            that the builder allocates for each call, null where the kernel asks for none), "int32",
            "int64", "float32", or "scale": a float32 that is given with every call.
    """

    name: str
    kind: str


C_TYPES = {
    "input": "const void*",
    "output": "void*",
    "input_float32": "const float*",
    "output_float32": "float*",
    "workspace": "void*",
    "int32": "int32_t",
    "int64": "int64_t",
    "float32": "float",
    "scale": "float",
}
"""Kind of an argument -> its type in C."""
_TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Op:
    """An operation and the arguments that all its kernels take.

    Attributes:
        name: key in OPS, and Problem.op.
        arguments: in order, without the last word (stream or num_threads).
    """

    name: str
    arguments: tuple[Argument, ...]

    @property
    def pointers(self) -> tuple[Argument, ...]:
        """The tensor arguments, which callers pass; all of them come first."""
        return tuple(arg for arg in self.arguments if arg.kind in _POINTERS)

    @property
    def scalars(self) -> tuple[Argument, ...]:
        """Sizes, strides and the cap: fixed once the Problem is known."""
        return tuple(arg for arg in self.arguments if arg.kind in _BOUND)

    @property
    def python_parameters(self) -> str:
        """The parameter list of a Triton kernel."""
        return ", ".join(arg.name for arg in self.arguments)

    def c_parameters(self, last: str) -> str:
        """The parameter list of a C launcher; `last` declares its last word."""
        listed = [f"{C_TYPES[arg.kind]} {arg.name}" for arg in self.arguments]
        return ", ".join([*listed, last])

    @property
    def c_scalars(self) -> str:
        """The parameter list of a C function of what is bound: `workspace_bytes`."""
        return ", ".join(f"{C_TYPES[arg.kind]} {arg.name}" for arg in self.scalars)

    def triton_signature(self, dtype: str) -> dict[str, str]:
        """Argument name to Triton type, for ahead-of-time compilation."""
        element = _TRITON_DTYPES[dtype]
        types = {
            "input": f"*{element}",
            "output": f"*{element}",
            "input_float32": "*fp32",
            "output_float32": "*fp32",
            "workspace": "*fp32",
            "int32": "i32",
            "int64": "i64",
            "float32": "fp32",
            "scale": "fp32",
        }
        return {arg.name: types[arg.kind] for arg in self.arguments}


_POINTERS = ("input", "output", "input_float32", "output_float32")
_BOUND = ("int32", "int64", "float32")
LAYOUT_AXES = {"bshd": (0, 1, 2), "bhsd": (0, 2, 1)}
"""Where batch, seqlen and heads lie among a tensor's dimensions; head_dim is always last."""


def _strides(tensor: str) -> tuple[Argument, ...]:
    return tuple(Argument(f"{tensor}_stride_{axis}", "int64") for axis in ("batch", "seq", "head"))


_LSE = Argument("lse", "output_float32")
"""(batch, num_heads, seqlen_q) contiguous, natural logarithm; null: not wanted."""

_WORKSPACE = Argument("workspace", "workspace")
"""Aligned to 16 bytes, its content undefined; how many bytes, a kernel says itself: see build/."""

_TENSORS = (Argument("q", "input"), Argument("k", "input"), Argument("v", "input"),
            Argument("out", "output"), _LSE)  # fmt: skip
_SCALARS = (
    Argument("batch", "int32"),
    Argument("seqlen_q", "int32"),
    Argument("seqlen_k", "int32"),
    Argument("num_heads", "int32"),
    Argument("num_kv_heads", "int32"),
    # Query row i sees keys from i + seqlen_k - seqlen_q - window_left to i + seqlen_k - seqlen_q +
    # window_right, both included. Kernels of a Problem that is not `local` need not read them.
    Argument("window_left", "int32"),
    Argument("window_right", "int32"),
    *_strides("q"),
    *_strides("k"),
    *_strides("v"),
    *_strides("out"),
    Argument("softcap", "float32"),
    Argument("softmax_scale", "scale"),
)
FWD = Op("fwd", (*_TENSORS, _WORKSPACE, *_SCALARS))
FWD_FP8 = Op(
    "fwd_fp8",
    (
        *_TENSORS,
        # (batch, num_kv_heads) contiguous: factor of what is stored of q, k and v; null: 1.
        Argument("q_descale", "input_float32"),
        Argument("k_descale", "input_float32"),
        Argument("v_descale", "input_float32"),
        _WORKSPACE,
        *_SCALARS,
    ),
)
FLEX = Op("flex", FWD.arguments)
"""FlexAttention's forward. Its kernels take tensors in place of addresses (Kernel.bind)."""
OPS = {op.name: op for op in (FWD, FWD_FP8, FLEX)}


def get(name: str) -> Op:
    """The op of that name, or UnknownName."""
    if name not in OPS:
        raise UnknownName.of("op", name, OPS)
    return OPS[name]


def fwd_scalars(
    tensors: Sequence[torch.Tensor], layout: str = "bshd", problem: Problem | None = None
) -> tuple[int | float, ...]:
    """What is bound of a forward call, in the order of FWD.scalars (and FWD_FP8.scalars).

    Args:
        tensors: q, k, v, out, each of four dimensions in `layout`.
        layout: "bshd" or "bhsd".
        problem: whose mask and softcap hold; None: no window, no softcap. Sizes and strides are
            those of the tensors.
    """
    b, s, h = LAYOUT_AXES[layout]
    q, k = tensors[0].shape, tensors[1].shape
    # An unbounded side reaches over everything, so that no number is special.
    left, right, softcap = k[s], q[s], 0.0
    if problem is not None:
        left = left if problem.window_left is None else problem.window_left
        right = right if problem.window_right is None else problem.window_right
        right = 0 if problem.causal else right
        softcap = problem.softcap
    scalars: list[int | float] = [q[b], q[s], k[s], q[h], k[h], left, right]
    for tensor in tensors:
        stride = tensor.stride()
        scalars += (stride[b], stride[s], stride[h])
    return (*scalars, softcap)
