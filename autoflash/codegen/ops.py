"""The argument list of each op, once: C parameters, Triton signature and launch scalars agree.

Every kernel of an op takes the same arguments in the same order, whatever its language: pointers,
then sizes and strides (in elements), then `softmax_scale`, then one word that depends on where it
runs (`stream` on a GPU, `num_threads` on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoflash.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a kernel.

    Attributes:
        name: as templates use it.
        kind: "input" or "output" (pointer to the problem's dtype), "output_float32" (pointer
            that may be null), "int32", "int64" or "float32".
    """

    name: str
    kind: str


_C_TYPES = {
    "input": "const void*",
    "output": "void*",
    "output_float32": "float*",
    "int32": "int32_t",
    "int64": "int64_t",
    "float32": "float",
}
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
        """The tensor arguments; all of them come first."""
        return tuple(arg for arg in self.arguments if arg.kind in _POINTERS)

    @property
    def scalars(self) -> tuple[Argument, ...]:
        """Sizes and strides: fixed once the shapes are known."""
        return tuple(arg for arg in self.arguments if arg.kind in ("int32", "int64"))

    @property
    def python_parameters(self) -> str:
        """The parameter list of a Triton kernel."""
        return ", ".join(arg.name for arg in self.arguments)

    def c_parameters(self, last: str) -> str:
        """The parameter list of a C launcher; `last` declares its last word."""
        listed = [f"{_C_TYPES[arg.kind]} {arg.name}" for arg in self.arguments]
        return ", ".join([*listed, last])

    def triton_signature(self, dtype: str) -> dict[str, str]:
        """Argument name to Triton type, for ahead-of-time compilation."""
        element = _TRITON_DTYPES[dtype]
        types = {
            "input": f"*{element}",
            "output": f"*{element}",
            "output_float32": "*fp32",
            "int32": "i32",
            "int64": "i64",
            "float32": "fp32",
        }
        return {arg.name: types[arg.kind] for arg in self.arguments}


_POINTERS = ("input", "output", "output_float32")
LAYOUT_AXES = {"bshd": (0, 1, 2), "bhsd": (0, 2, 1)}
"""Where batch, seqlen and heads lie among a tensor's dimensions; head_dim is always last."""


def _strides(tensor: str) -> tuple[Argument, ...]:
    return tuple(Argument(f"{tensor}_stride_{axis}", "int64") for axis in ("batch", "seq", "head"))


FWD = Op(
    "fwd",
    (
        Argument("q", "input"),
        Argument("k", "input"),
        Argument("v", "input"),
        Argument("out", "output"),
        # (batch, num_heads, seqlen_q) contiguous, natural logarithm; null: not wanted.
        Argument("lse", "output_float32"),
        Argument("batch", "int32"),
        Argument("seqlen_q", "int32"),
        Argument("seqlen_k", "int32"),
        Argument("num_heads", "int32"),
        Argument("num_kv_heads", "int32"),
        *_strides("q"),
        *_strides("k"),
        *_strides("v"),
        *_strides("out"),
        Argument("softmax_scale", "float32"),
    ),
)
OPS = {op.name: op for op in (FWD,)}


def get(name: str) -> Op:
    """The op of that name, or UnknownName."""
    if name not in OPS:
        raise UnknownName.of("op", name, OPS)
    return OPS[name]


def fwd_scalars(tensors: Sequence[torch.Tensor], layout: str = "bshd") -> tuple[int, ...]:
    """Sizes and strides of a forward call, in the order of FWD.scalars.

    Args:
        tensors: q, k, v, out, each of four dimensions in `layout`.
        layout: "bshd" or "bhsd".
    """
    b, s, h = LAYOUT_AXES[layout]
    q, k = tensors[0].shape, tensors[1].shape
    scalars = [q[b], q[s], k[s], q[h], k[h]]
    for tensor in tensors:
        stride = tensor.stride()
        scalars += (stride[b], stride[s], stride[h])
    return tuple(scalars)
