"""Problem: what is asked of a kernel. Knows its FLOPs, its bytes, its name and its bucket."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoflash.errors import InvalidInput, UnknownName

ELEMENT_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes per element of each dtype, by PyTorch's name."""

TRAITS = ("op", "dtype", "head_dim", "head_dim_v", "group_size", "causal", "aligned")
"""What a kernel may be compiled for; all else of a Problem is known only when it is launched."""

_NAME = re.compile(
    r"(?:(?P<op>[a-z_]+):)?b(?P<batch>\d+)s(?P<seqlen_q>\d+)(?:x(?P<seqlen_k>\d+))?"
    r"h(?P<num_heads>\d+)(?:/(?P<num_kv_heads>\d+))?d(?P<head_dim>\d+)(?:x(?P<head_dim_v>\d+))?"
    r"(?P<mask>[cf])(?:-(?P<dtype>[a-z0-9]+))?(?P<unaligned>-unaligned)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One attention call, without its data.

    Attributes:
        op: which operation, a key of autoflash.codegen.ops.OPS.
        dtype: of q, k, v and out, by PyTorch's name ("bfloat16").
        batch: number of sequences.
        seqlen_q: query rows of each sequence.
        seqlen_k: key and value rows of each sequence.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: elements of a query or key row.
        head_dim_v: elements of a value or output row; 0 means head_dim.
        causal: query row i sees key rows j <= i + seqlen_k - seqlen_q (bottom-right aligned).
        aligned: every base address and every stride is a multiple of 16 bytes.
    """

    op: str = "fwd"
    dtype: str = "bfloat16"
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int = 0
    causal: bool = False
    aligned: bool = True

    def __post_init__(self) -> None:
        if not self.head_dim_v:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        if self.dtype not in ELEMENT_SIZES:
            raise UnknownName.of("dtype", self.dtype, ELEMENT_SIZES)
        for name, least in (
            ("batch", 0),
            ("seqlen_q", 0),
            ("seqlen_k", 0),
            ("num_heads", 1),
            ("num_kv_heads", 1),
            ("head_dim", 1),
            ("head_dim_v", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InvalidInput(f"{name}={value!r}: a whole number from {least} up is needed.")
        if self.num_heads % self.num_kv_heads:
            raise InvalidInput(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}: each key/value head must serve as many query heads as "
                "every other."
            )

    @property
    def element_size(self) -> int:
        """Bytes per element of q, k, v and out."""
        return ELEMENT_SIZES[self.dtype]

    @property
    def group_size(self) -> int:
        """Query heads per key/value head: 1 is multi-head, num_heads is multi-query attention."""
        return self.num_heads // self.num_kv_heads

    @property
    def pairs(self) -> float:
        """Query-key pairs of one head that the mask lets through, by the field's count.

        Half of seqlen_q * seqlen_k for a square causal mask (the diagonal is not counted twice),
        as in the FlashAttention benchmarks.
        """
        if not self.causal:
            return float(self.seqlen_q * self.seqlen_k)
        rows = min(self.seqlen_q, self.seqlen_k)
        return rows * (self.seqlen_k - rows + self.seqlen_k) / 2

    @property
    def flops(self) -> float:
        """Floating-point operations of the two products: 2 * pairs * (head_dim + head_dim_v)."""
        return 2.0 * self.batch * self.num_heads * self.pairs * (self.head_dim + self.head_dim_v)

    @property
    def bytes(self) -> int:
        """The fewest bytes that must move: each input read once, out and lse written once."""
        rows_q = self.batch * self.num_heads * self.seqlen_q
        rows_k = self.batch * self.num_kv_heads * self.seqlen_k
        dims = self.head_dim + self.head_dim_v
        return self.element_size * dims * (rows_q + rows_k) + 4 * rows_q

    def tflops(self, latency_us: float) -> float:
        """Achieved rate in TFLOPS when one call takes `latency_us`."""
        return self.flops / latency_us / 1e6

    @property
    def name(self) -> str:
        """Short text that `parse` reads back, such as "b4s4096h32/8d128c-bfloat16"."""
        op = "" if self.op == "fwd" else f"{self.op}:"
        seqlen = f"{self.seqlen_q}" + (
            f"x{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else ""
        )
        dim = f"{self.head_dim}" + (
            f"x{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        )
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        mask = "c" if self.causal else "f"
        unaligned = "" if self.aligned else "-unaligned"
        return f"{op}b{self.batch}s{seqlen}h{heads}d{dim}{mask}-{self.dtype}{unaligned}"

    @classmethod
    def parse(cls, text: str, dtype: str = "bfloat16") -> Problem:
        """Read a `name`: b<batch>s<seqlen>[x<seqlen_k>]h<heads>[/<kv heads>]d<dim>[x<dim_v>]c|f.

        Args:
            text: the name; c is causal, f is full; "-<dtype>" may follow.
            dtype: used where the name gives none.

        Raises:
            InvalidInput: the text does not have that form.
        """
        found = _NAME.fullmatch(text.strip())
        if not found:
            raise InvalidInput(
                f"problem {text!r} is not of the form b<batch>s<seqlen>[x<seqlen_k>]h<heads>"
                "[/<kv_heads>]d<head_dim>[x<head_dim_v>]c|f[-<dtype>], such as b4s4096h32/8d128c."
            )
        part = found.groupdict()
        return cls(
            op=part["op"] or "fwd",
            dtype=part["dtype"] or dtype,
            batch=int(part["batch"]),
            seqlen_q=int(part["seqlen_q"]),
            seqlen_k=int(part["seqlen_k"] or part["seqlen_q"]),
            num_heads=int(part["num_heads"]),
            num_kv_heads=int(part["num_kv_heads"] or part["num_heads"]),
            head_dim=int(part["head_dim"]),
            head_dim_v=int(part["head_dim_v"] or part["head_dim"]),
            causal=part["mask"] == "c",
            aligned=part["unaligned"] is None,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form holding every field."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        """Inverse of `to_dict`; a field that this version does not know is an InvalidInput."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(data) - known:
            raise UnknownName.of("problem field", min(unknown), known)
        try:
            return cls(**data)
        except TypeError as error:
            raise InvalidInput(f"problem {json.dumps(dict(data))} is incomplete: {error}") from None

    @property
    def traits(self) -> dict[str, Any]:
        """The part of the Problem that a kernel may be compiled for (TRAITS)."""
        return {name: getattr(self, name) for name in TRAITS}

    def distance(self, other: Problem) -> float:
        """How unlike two problems are as work for one kernel; infinite where none fits both.

        Differences count in doublings: of each sequence length, and half as much of the number
        of (batch, head) pairs and of the heads that share keys, since those change how many
        thread blocks there are but not what one does. The two 16-bit dtypes are one doubling apart:
        their kernels differ in the kind of a few instructions only.
        """
        # Written out: serving asks this of every record of a kind for each new problem.
        if not (
            self.head_dim == other.head_dim
            and (self.dtype == other.dtype or self.element_size == other.element_size)
            and self.causal == other.causal
            and self.head_dim_v == other.head_dim_v
            and self.op == other.op
        ):
            return math.inf

        def doublings(one: int, two: int) -> float:
            return 0.0 if one == two else abs(math.log2((one or 1) / (two or 1)))

        return (
            doublings(self.seqlen_q, other.seqlen_q)
            + doublings(self.seqlen_k, other.seqlen_k)
            + 0.5 * doublings(self.batch * self.num_heads, other.batch * other.num_heads)
            + 0.5 * doublings(self.group_size, other.group_size)
            + (0.0 if self.aligned == other.aligned else 1.0)
            + (0.0 if self.dtype == other.dtype else 1.0)
        )
