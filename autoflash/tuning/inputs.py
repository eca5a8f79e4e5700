"""On what data is a kernel checked and timed?

Random normal, never zeros (a GPU runs faster on zeros). Outputs are poisoned with NaN and lie
between guard zones, so that what is left unwritten and what is written outside both show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoflash.device import Device
from autoflash.errors import UnknownName
from autoflash.problem import Problem

if TYPE_CHECKING:
    import torch

_GUARD = 128
"""Elements before and after each output: 256 bytes or more, which keeps any alignment."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of one call.

    Attributes:
        problem: what they are for.
        layout: "bshd" or "bhsd", the order of dimensions of q, k, v and out.
        softmax_scale: 1 / sqrt(head_dim).
        q: (batch, seqlen_q, num_heads, head_dim) for layout "bshd".
        k: (batch, seqlen_k, num_kv_heads, head_dim).
        v: (batch, seqlen_k, num_kv_heads, head_dim_v).
        out: (batch, seqlen_q, num_heads, head_dim_v), of problem.out_dtype.
        lse: (batch, num_heads, seqlen_q) float32, contiguous.
        descales: factors of q, k and v, (batch, num_kv_heads) float32 each, where q has 8 bits;
            else none.
    """

    problem: Problem
    layout: str
    softmax_scale: float
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    descales: tuple[torch.Tensor, ...]
    _buffers: tuple[torch.Tensor, ...]  # that q, k, v, out and lse are views of

    def poison(self) -> None:
        """Fill the outputs and their guard zones with NaN."""
        for buffer in self._buffers[3:]:
            buffer.fill_(math.nan)

    def damage(self, *, lse: bool = True) -> str | None:
        """What a kernel did to memory since `poison` that it must not; None if nothing.

        Args:
            lse: whether the kernel was asked to write `lse`.
        """
        for name, view, buffer, asked in (
            ("out", self.out, self._buffers[3], True),
            ("lse", self.lse, self._buffers[4], lse),
        ):
            unwritten = int(view.isnan().sum())
            if asked and unwritten:
                where = first_index(view.isnan())
                return (
                    f"{name} is NaN or was left unwritten at {unwritten} of {view.numel()} "
                    f"elements, first at {name}{where} (layout {self.layout})"
                )
            if _touched(view, buffer):
                return f"it wrote outside of {name}"
        return None

    def overrun(self) -> bool:
        """Whether a kernel wrote into the guard zones since `poison`."""
        pairs = ((self.out, self._buffers[3]), (self.lse, self._buffers[4]))
        return any(_touched(view, buffer) for view, buffer in pairs)

    @contextmanager
    def holding(self, other: Inputs) -> Iterator[None]:
        """For a while, the values of other inputs of the same problem, with V negated.

        Attention is linear in V: a negated V negates the output, and leaves the LSE.
        """
        mine = (self.q, self.k, self.v, *self.descales)
        theirs = (other.q, other.k, other.v, *other.descales)
        kept = [tensor.clone() for tensor in mine]
        try:
            for tensor, values in zip(mine, theirs, strict=True):
                tensor.copy_(values)
            negate(self.v)
            yield
        finally:
            for tensor, values in zip(mine, kept, strict=True):
                tensor.copy_(values)

    def fingerprint(self) -> tuple[int, ...]:
        """Sums over the bits of all inputs: tells whether a kernel changed one."""
        import torch

        words = {1: torch.int8, 2: torch.int16, 4: torch.int32}
        given = (*self._buffers[:3], *self.descales)
        return tuple(int(tensor.view(words[tensor.itemsize]).sum()) for tensor in given)


def negate(tensor: torch.Tensor) -> None:
    """Change the sign of every element in place; of 8 bits too, where PyTorch has no arithmetic."""
    import torch

    bits = 8 * tensor.element_size()
    words = tensor.view(getattr(torch, f"int{bits}"))
    words.bitwise_xor_(-(1 << (bits - 1)))


def _touched(view: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Whether a poisoned buffer holds anything but NaN outside of its view."""
    inside = int(view.isnan().sum())
    return int(buffer.isnan().sum()) - inside != buffer.numel() - view.numel()


def bshd(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A view of (batch, seqlen, heads, dim), whatever the layout of `tensor`."""
    return tensor if layout == "bshd" else tensor.transpose(1, 2)


def first_index(wrong: torch.Tensor) -> list[int]:
    """Index of the first true element of a boolean tensor that has one."""
    return [int(i) for i in wrong.nonzero()[0]]


def torch_device_of(device: Device) -> str:
    """PyTorch's name for where a Device's tensors lie."""
    return "cuda" if device.is_cuda else "cpu"


def make_inputs(
    problem: Problem,
    device: Device,
    seed: int = 0,
    layout: str = "bshd",
    torch_device: str | torch.device | None = None,
    *,
    q_factor: float = 1.0,
) -> Inputs:
    """Random inputs and poisoned outputs for a problem.

    An aligned problem gets addresses and strides that are multiples of 16 bytes, an unaligned one
    strides and addresses that are not. What q, k and v with 8 bits hold is normal; their descales,
    which differ from head to head, are between 0.5 and 2, and those of q hold its factor.

    Args:
        problem: gives shapes, dtype and alignment.
        device: where the kernel runs.
        seed: of the values; the same seed gives the same values on the same kind of device.
        layout: "bshd" or "bhsd".
        torch_device: where to put the tensors, if not on `device`.
        q_factor: q is multiplied by it; large ones give large logits.

    Raises:
        UnknownName: the layout is neither.
    """
    import torch

    if layout not in ("bshd", "bhsd"):
        raise UnknownName.of("layout", layout, ("bshd", "bhsd"))
    where = torch.device(torch_device or torch_device_of(device))
    dtype: torch.dtype = getattr(torch, problem.dtype)
    random = torch.Generator(where).manual_seed(seed)
    p = problem
    shapes = (
        (p.batch, p.seqlen_q, p.num_heads, p.head_dim),
        (p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim),
        (p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim_v),
        (p.batch, p.seqlen_q, p.num_heads, p.head_dim_v),
    )
    views, buffers = [], []
    out_dtype: torch.dtype = getattr(torch, p.out_dtype)
    for shape, kind in zip(shapes, (dtype, dtype, dtype, out_dtype), strict=True):
        view, buffer = _tensor(shape, layout, kind, where, aligned=p.aligned)
        views.append(view)
        buffers.append(buffer)
    eight_bits = p.element_size == 1
    for view, factor in zip(views[:3], (q_factor, 1.0, 1.0), strict=True):
        if eight_bits:  # PyTorch draws none of these
            drawn = torch.empty(view.shape, dtype=torch.float32, device=where)
            view.copy_(drawn.normal_(generator=random))
        elif view.numel():
            view.normal_(std=factor, generator=random)
    descales = []
    for factor in (q_factor, 1.0, 1.0) if eight_bits else ():
        heads = torch.empty(p.batch, p.num_kv_heads, dtype=torch.float32, device=where)
        descales.append(heads.uniform_(0.5, 2.0, generator=random).mul_(factor))
    shift = 0 if p.aligned else 1
    rows = p.batch * p.num_heads * p.seqlen_q
    lse_buffer = torch.empty(rows + 2 * _GUARD + shift, dtype=torch.float32, device=where)
    lse = lse_buffer[_GUARD + shift :][:rows].view(p.batch, p.num_heads, p.seqlen_q)
    q, k, v, out = views
    scale = 1.0 / math.sqrt(p.head_dim)
    inputs = Inputs(p, layout, scale, q, k, v, out, lse, tuple(descales), (*buffers, lse_buffer))
    inputs.poison()
    return inputs


def _tensor(
    shape: tuple[int, int, int, int],
    layout: str,
    dtype: torch.dtype,
    where: torch.device,
    *,
    aligned: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of (batch, seqlen, heads, dim) in `layout`, and the flat buffer that it views."""
    import torch

    batch, seqlen, heads, dim = shape
    outer = (batch, seqlen, heads) if layout == "bshd" else (batch, heads, seqlen)
    unit = 16 // dtype.itemsize  # elements of 16 bytes
    if aligned:
        pitch, shift = -(-dim // unit) * unit, 0
    else:
        pitch, shift = dim + (2 if (dim + 1) % unit == 0 else 1), 1
    size = math.prod(outer) * pitch
    buffer = torch.zeros(size + 2 * _GUARD + shift, dtype=dtype, device=where)
    view = buffer[_GUARD + shift :][:size].view(*outer, pitch)[..., :dim]
    return view, buffer
