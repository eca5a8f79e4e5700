"""Which kernels may serve a call, the best first? Reads table.json; needs no torch and no GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SCHEMA_VERSION = 1


class Problem(NamedTuple):
    """One call without its data, as the rows of the table have it."""

    op: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool
    window_left: int | None
    window_right: int | None
    softcap: float
    aligned: bool

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def local(self) -> bool:
        """Whether a window bounds what a row sees, beyond the causal mask."""
        return self.window_left is not None or self.window_right is not None

    @property
    def softcapped(self) -> bool:
        """Whether scores are capped."""
        return self.softcap > 0.0

    def settled(self) -> Problem:
        """The same with equal masks in equal fields: a bound that no row reaches is none."""
        left, right = self.window_left, self.window_right
        causal = self.causal or right == 0
        unbounded = causal or (right is not None and right >= self.seqlen_q - 1)
        return self._replace(
            causal=causal,
            window_right=None if unbounded else right,
            window_left=None if left is not None and left >= self.seqlen_k - 1 else left,
        )

    def feature(self, name: str) -> int:
        """What a leaf of a dispatch table may ask for."""
        if name == "tiles":
            rows: int = table()["limits"]["tile_rows"]
            return self.batch * self.num_heads * -(-self.seqlen_q // rows)
        value: int = self.batch * self.num_heads if name == "heads" else getattr(self, name)
        return value


@cache
def table() -> dict[str, Any]:
    """The content of table.json."""
    found: dict[str, Any] = json.loads((HERE / "table.json").read_text(encoding="utf-8"))
    if found["schema_version"] != SCHEMA_VERSION:
        raise RuntimeError(
            f"{HERE / 'table.json'} is of schema version {found['schema_version']}, this loader "
            f"reads {SCHEMA_VERSION}: export the package again."
        )
    return found


@cache
def _winners() -> list[tuple[Problem, str]]:
    return [(Problem(**row["problem"]), row["kernel"]) for row in table()["winners"]]


def choices(problem: Problem) -> Iterator[tuple[str, str]]:
    """(rule, name of a kernel) of all that may serve a settled problem, the best first.

    Rules: "exact" (tuned for this very problem), "table" (what was measured to be best for such
    shapes), "nearest" (the winner of the nearest problem). None: PyTorch is to serve.
    """
    seen = set()
    for rule, kernel in _ranked(problem):
        if kernel not in seen and fits(kernel, problem):
            seen.add(kernel)
            yield rule, kernel


def fits(kernel: str, problem: Problem) -> bool:
    """Whether a kernel was compiled for what this problem is."""
    facts = table()["kernels"][kernel]
    alike = all(getattr(problem, name) == value for name, value in facts["traits"].items())
    return alike and problem.group_size in facts["group_sizes"]


def _ranked(problem: Problem) -> Iterator[tuple[str, str]]:
    yield from (("exact", kernel) for tuned, kernel in _winners() if tuned == problem)
    yield from (("table", kernel) for kernel in _tabled(problem))
    near = sorted((distance(problem, tuned), kernel) for tuned, kernel in _winners())
    most = table()["limits"]["max_distance"]
    yield from (("nearest", kernel) for far, kernel in near if far <= most)


def _tabled(problem: Problem) -> list[str]:
    """The kernels of the config that a dispatch table has for such a shape."""
    for each in table()["tables"]:
        if any(getattr(problem, name) != value for name, value in each["family"].items()):
            continue
        probes = ((distance(problem, Problem(**shape)), best) for shape, best in each["probes"])
        far, default = min(probes, default=(math.inf, None))
        if far > table()["limits"]["reach"]:
            continue
        for leaf in each["leaves"]:
            if all(_within(problem, *bound) for bound in leaf["where"]):
                config = default if leaf["config"] is None else leaf["config"]
                found: list[str] = each["kernels"].get(str(config), [])
                return found
    return []


def _within(problem: Problem, feature: str, above: int | None, most: int | None) -> bool:
    value = problem.feature(feature)
    return (above is None or value > above) and (most is None or value <= most)


def distance(one: Problem, two: Problem) -> float:
    """How unlike two problems are in size, in doublings; infinite where masks or dims differ."""
    same = ("op", "dtype", "head_dim", "head_dim_v", "causal", "local", "softcapped", "aligned")
    if any(getattr(one, name) != getattr(two, name) for name in same):
        return math.inf

    def doublings(a: int, b: int) -> float:
        return abs(math.log2((a or 1) / (b or 1)))

    return (
        doublings(one.seqlen_q, two.seqlen_q)
        + doublings(one.seqlen_k, two.seqlen_k)
        + 0.5 * doublings(one.batch * one.num_heads, two.batch * two.num_heads)
        + 0.5 * doublings(one.group_size, two.group_size)
        + (doublings(_reach(one), _reach(two)) if one.local else 0.0)
    )


def _reach(problem: Problem) -> int:
    """Keys of the widest row under a sliding window."""
    left = problem.seqlen_k if problem.window_left is None else problem.window_left
    right = problem.seqlen_q if problem.window_right is None else problem.window_right
    return min(problem.seqlen_k, left + 1 + (0 if problem.causal else right))
