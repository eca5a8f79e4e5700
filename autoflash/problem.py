"""Problem: what is asked of a kernel. Knows its FLOPs, its bytes, its name and its bucket."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoflash.errors import InvalidInput, UnknownName

ELEMENT_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}
"""Bytes per element of q, k and v of each dtype, by PyTorch's name."""

OP_OF_DTYPE = {"float8_e4m3fn": "fwd_fp8"}
"""The forward op of dtypes whose kernels take more than q, k and v (codegen/ops.py)."""

FOREIGN_OPS = ("flex",)
"""Ops whose kernels are other libraries', tuned through their own options; attention() never asks
for them. What they compute is the forward."""

TRAITS = (
    "op",
    "dtype",
    "head_dim",
    "head_dim_v",
    "group_size",
    "causal",
    "local",
    "softcapped",
    "aligned",
)
"""What a kernel may be compiled for; all else of a Problem is known only when it is launched."""

MAX_DISTANCE = 6.0
"""Farthest record that may stand in, in doublings: both sequence lengths eight times as long.

Beyond that the work is of another kind: a decoding step (seqlen_q 1) is 12 doublings away from a
prefill of 4096, and a template's default fits it better than the winner of the other.
"""

_NAME = re.compile(
    r"(?:(?P<op>[a-z_]+):)?b(?P<batch>\d+)s(?P<seqlen_q>\d+)(?:x(?P<seqlen_k>\d+))?"
    r"h(?P<num_heads>\d+)(?:/(?P<num_kv_heads>\d+))?d(?P<head_dim>\d+)(?:x(?P<head_dim_v>\d+))?"
    r"(?P<mask>[cf])(?:w(?P<left>\d+|inf)(?:x(?P<right>\d+|inf))?)?"
    r"(?:cap(?P<softcap>\d+(?:\.\d+)?(?:e[+-]?\d+)?))?"
    r"(?:-(?P<dtype>[a-z0-9_]+))?(?P<unaligned>-unaligned)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One attention call, without its data.

    Attributes:
        op: which operation, a key of autoflash.codegen.ops.OPS. "fwd" of a dtype in OP_OF_DTYPE
            becomes that.
        dtype: of q, k and v, by PyTorch's name ("bfloat16"); out_dtype is that of out.
        batch: number of sequences.
        seqlen_q: query rows of each sequence.
        seqlen_k: key and value rows of each sequence.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: elements of a query or key row.
        head_dim_v: elements of a value or output row; 0 means head_dim.
        causal: query row i sees key rows j <= i + seqlen_k - seqlen_q (bottom-right aligned).
        window_left: query row i sees key rows j >= i + seqlen_k - seqlen_q - window_left; None is
            unbounded, and so becomes a bound that no row reaches.
        window_right: query row i sees key rows j <= i + seqlen_k - seqlen_q + window_right; None
            is unbounded. A bound of 0 is the causal mask and becomes `causal`.
        softcap: scores become softcap * tanh(score * softmax_scale / softcap); 0 is off.
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
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
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
        if self.op == "fwd":
            object.__setattr__(self, "op", OP_OF_DTYPE.get(self.dtype, "fwd"))
        self._settle_mask()

    def _settle_mask(self) -> None:
        """Check window and softcap, and give equal masks equal fields."""
        left, right = self.window_left, self.window_right
        for name, bound in (("window_left", left), ("window_right", right)):
            if bound is not None and (not isinstance(bound, int) or bound < 0):
                raise InvalidInput(
                    f"{name}={bound!r}: a whole number from 0 up is needed, or None for no bound."
                )
        softcap = self.softcap
        if not isinstance(softcap, int | float) or not 0.0 <= softcap < math.inf:
            raise InvalidInput(
                f"softcap={softcap!r}: a finite number from 0 up is needed; 0 turns it off."
            )
        causal = self.causal or right == 0
        # Row 0 looks farthest beyond its window on the right, the last row on the left.
        unbounded = right is not None and right >= self.seqlen_q - 1
        settled = {
            "causal": causal,
            "window_right": None if causal or unbounded else right,
            "window_left": None if left is not None and left >= self.seqlen_k - 1 else left,
            "softcap": float(softcap),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @property
    def is_foreign(self) -> bool:
        """Whether its kernels are another library's (FOREIGN_OPS)."""
        return self.op in FOREIGN_OPS

    @property
    def forward(self) -> Problem:
        """The call of attention() that computes the same; itself unless it is foreign."""
        return dataclasses.replace(self, op="fwd") if self.is_foreign else self

    @property
    def element_size(self) -> int:
        """Bytes per element of q, k and v."""
        return ELEMENT_SIZES[self.dtype]

    @property
    def out_dtype(self) -> str:
        """The dtype of out, by PyTorch's name: that of q, or bfloat16 where q has 8 bits."""
        return self.dtype if self.element_size > 1 else "bfloat16"

    @property
    def local(self) -> bool:
        """Whether a sliding window bounds what a row sees, beyond the causal mask."""
        return self.window_left is not None or self.window_right is not None

    @property
    def softcapped(self) -> bool:
        """Whether scores are soft-capped."""
        return self.softcap > 0.0

    @property
    def group_size(self) -> int:
        """Query heads per key/value head: 1 is multi-head, num_heads is multi-query attention."""
        return self.num_heads // self.num_kv_heads

    def tiles(self, rows: int) -> int:
        """How many tiles of so many query rows there are, of all heads and sequences."""
        return self.batch * self.num_heads * -(-self.seqlen_q // rows)

    @property
    def pairs(self) -> float:
        """Query-key pairs of one head that the mask lets through, by the field's count.

        Half of seqlen_q * seqlen_k for a square causal mask (the diagonal is not counted twice),
        as in the FlashAttention benchmarks.
        """
        if self.local:
            # Row i sees keys from i + left_end to i + right_end, as far as there are any.
            offset, last = self.seqlen_k - self.seqlen_q, self.seqlen_k - 1
            right = 0 if self.causal else self.window_right
            ends = (
                _clamped_sum(offset + right, self.seqlen_q, -1, last)
                if right is not None
                else (last * self.seqlen_q)
            )
            left = self.window_left
            starts = 0 if left is None else _clamped_sum(offset - left, self.seqlen_q, 0, last + 1)
            return float(ends - starts + self.seqlen_q)
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
        read = self.head_dim * rows_q + (self.head_dim + self.head_dim_v) * rows_k
        out = ELEMENT_SIZES[self.out_dtype] * self.head_dim_v * rows_q
        return self.element_size * read + out + 4 * rows_q

    def tflops(self, latency_us: float) -> float:
        """Achieved rate in TFLOPS when one call takes `latency_us`."""
        return self.flops / latency_us / 1e6

    @property
    def name(self) -> str:
        """Short text that `parse` reads back, such as "b4s4096h32/8d128c-bfloat16"."""
        op = "" if self.op == OP_OF_DTYPE.get(self.dtype, "fwd") else f"{self.op}:"
        seqlen = f"{self.seqlen_q}" + (
            f"x{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else ""
        )
        dim = f"{self.head_dim}" + (
            f"x{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        )
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        mask = "c" if self.causal else "f"
        if self.local:
            mask += f"w{_bound(self.window_left)}"
            mask += "" if self.causal else f"x{_bound(self.window_right)}"
        if self.softcapped:
            short = f"{self.softcap:g}"
            mask += f"cap{short if float(short) == self.softcap else repr(self.softcap)}"
        unaligned = "" if self.aligned else "-unaligned"
        return f"{op}b{self.batch}s{seqlen}h{heads}d{dim}{mask}-{self.dtype}{unaligned}"

    @classmethod
    def parse(cls, text: str, dtype: str = "bfloat16") -> Problem:
        """Read a `name`: b<batch>s<seqlen>[x<seqlen_k>]h<heads>[/<kv heads>]d<dim>[x<dim_v>]c|f.

        Args:
            text: the name; c is causal, f is full. "w<left>" or "w<left>x<right>" may follow, a
                sliding window whose bounds are numbers or "inf", then "cap<softcap>", then
                "-<dtype>".
            dtype: used where the name gives none.

        Raises:
            InvalidInput: the text does not have that form.
        """
        found = _NAME.fullmatch(text.strip())
        if not found:
            raise InvalidInput(
                f"problem {text!r} is not of the form b<batch>s<seqlen>[x<seqlen_k>]h<heads>"
                "[/<kv_heads>]d<head_dim>[x<head_dim_v>]c|f[w<left>[x<right>]][cap<softcap>]"
                "[-<dtype>], such as b4s4096h32/8d128c or b1s8192h8d256cw1023cap50-float16."
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
            window_left=_parse_bound(part["left"]),
            window_right=_parse_bound(part["right"]),
            softcap=float(part["softcap"] or 0.0),
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
            and self.local == other.local
            and self.softcapped == other.softcapped
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
            + (doublings(self._reach, other._reach) if self.local else 0.0)
            + (0.0 if self.aligned == other.aligned else 1.0)
            + (0.0 if self.dtype == other.dtype else 1.0)
        )

    @property
    def _reach(self) -> int:
        """Keys of the widest row under a sliding window."""
        left = self.seqlen_k if self.window_left is None else self.window_left
        right = self.seqlen_q if self.window_right is None else self.window_right
        return min(self.seqlen_k, left + 1 + (0 if self.causal else right))


def require_work(problems: Iterable[Problem]) -> None:
    """See that there is something to time.

    Raises:
        InvalidInput: a problem has no work in it.
    """
    for problem in problems:
        if not problem.flops:
            raise InvalidInput(f"{problem.name} has no work in it: there is nothing to time.")


def _bound(value: int | None) -> str:
    return "inf" if value is None else str(value)


def _parse_bound(text: str | None) -> int | None:
    return None if text in (None, "inf") else int(text)


def _clamped_sum(first: int, count: int, low: int, high: int) -> int:
    """Sum of min(max(first + i, low), high) over i from 0 to count - 1, for low <= high."""
    below = min(max(low - first, 0), count)
    above = min(max(first + count - 1 - high, 0), count - below)
    between = count - below - above
    start = first + below
    return below * low + above * high + between * start + between * (between - 1) // 2
