"""Partition: the few leaves of a dispatch table whose worst regret over the probes is least.

Every tree of at most MOST_LEAVES leaves is considered, not only those that a greedy search meets:
with some twenty probes and a threshold between any two of their values there are few enough, since
the worst regret of a tree is the worse one of its two sides, each of which is solved by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from autoflash.dispatch_table import FEATURES, Bound, Leaf, Probe

MOST_LEAVES = 4
"""More than a person reads at a glance, and than some twenty probes can tell apart."""
FEWEST_PROBES = 2
"""In a leaf: one probe alone may be one bad measurement."""
SLACK = 0.02
"""A config that is slower than the default by more, at any probe of a leaf, cannot be the leaf's:
repeated measurements move by less."""
GAIN = 0.005
"""In the mean over a leaf a config must beat the default by as much, and a table of more leaves one
of fewer: a smaller difference is noise."""


class _Tree(NamedTuple):
    """A leaf (feature "") or a split, with the merit of all below it; less is better."""

    worst: float
    total: float
    leaves: int
    mask: int
    config: int | None = None
    feature: str = ""
    threshold: int = 0
    low: _Tree | None = None
    high: _Tree | None = None


def partition(probes: Sequence[Probe], *, most_leaves: int = MOST_LEAVES) -> tuple[Leaf, ...]:
    """Choose leaves that minimise the worst regret over the probes that are not held out.

    In a leaf the default serves unless one config beats it there: nowhere slower than SLACK allows
    and faster by GAIN in the geometric mean. Of the trees whose worst and mean regret are within
    GAIN of the best one's, the one with the fewest leaves is taken.

    Args:
        probes: of one family; those that are held out are not looked at.
        most_leaves: how many there may be.

    Returns:
        The leaves, from the low end of the first split; one at least.
    """
    seen = [probe for probe in probes if not probe.held_out]
    search = _Search(seen)
    everything = (1 << len(seen)) - 1
    trees = [search.best(everything, leaves) for leaves in range(1, most_leaves + 1)]
    count = max(len(seen), 1)

    def is_as_good(tree: _Tree) -> bool:
        least = trees[-1]
        return tree.worst <= least.worst + GAIN and tree.total / count <= least.total / count + GAIN

    chosen = next(tree for tree in trees if is_as_good(tree))
    return tuple(search.leaves(chosen, ()))


class _Search:
    """The best tree of any subset of the probes; a subset is a bit mask."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._size = len(probes)
        configs = len(probes[0].times_us) if probes else 0
        # Logarithms of the time over the oracle's, by probe; infinite where a config cannot run.
        self._default = [math.log(p.default_us / p.best_us) for p in probes]
        self._regrets = [
            [math.inf if t is None else math.log(t / p.best_us) for t in p.times_us] for p in probes
        ]
        self._configs = range(configs)
        self._splits = _splits(probes)
        self.leaf = cache(self._leaf)
        self.best = cache(self._best)

    def _members(self, mask: int) -> list[int]:
        return [number for number in range(self._size) if mask >> number & 1]

    def _leaf(self, mask: int) -> _Tree:
        members = self._members(mask)
        defaults = [self._default[n] for n in members]
        found = _Tree(max(defaults, default=0.0), sum(defaults), 1, mask)
        limits = [each + math.log1p(SLACK) for each in defaults]
        most = sum(defaults) - len(members) * math.log1p(GAIN)
        for config in self._configs:
            regrets = [self._regrets[n][config] for n in members]
            if any(regret > limit for regret, limit in zip(regrets, limits, strict=True)):
                continue
            total = sum(regrets)
            if total <= most:
                found = min(found, _Tree(max(regrets), total, 1, mask, config), key=_merit)
        return found

    def _best(self, mask: int, leaves: int) -> _Tree:
        found = self.leaf(mask)
        if leaves == 1 or found.worst <= GAIN:
            return found
        for feature, threshold, below in self._splits:
            low, high = mask & below, mask & ~below
            if low.bit_count() < FEWEST_PROBES or high.bit_count() < FEWEST_PROBES:
                continue
            for share in range(1, leaves):
                one, two = self.best(low, share), self.best(high, leaves - share)
                both = _Tree(
                    max(one.worst, two.worst), one.total + two.total, one.leaves + two.leaves,
                    mask, None, feature, threshold, one, two,
                )  # fmt: skip
                found = min(found, both, key=_merit)
        return found

    def leaves(self, tree: _Tree, where: tuple[Bound, ...]) -> list[Leaf]:
        """The leaves of a tree that is reached where these bounds hold."""
        if tree.low is None or tree.high is None:
            count = max(tree.mask.bit_count(), 1)
            mean, worst = math.expm1(tree.total / count), math.expm1(tree.worst)
            return [
                Leaf(
                    where=where, config=tree.config, probes=tree.mask.bit_count(),
                    mean=mean, worst=worst,
                )
            ]  # fmt: skip
        low = _narrowed(where, Bound(tree.feature, None, tree.threshold))
        high = _narrowed(where, Bound(tree.feature, tree.threshold, None))
        return [*self.leaves(tree.low, low), *self.leaves(tree.high, high)]


def _merit(tree: _Tree) -> tuple[float, float, int]:
    """Rounded, so that a sum taken in another order is the same sum; ties go to what came first."""
    return round(tree.worst, 9), round(tree.total, 9), tree.leaves


def _splits(probes: Sequence[Probe]) -> list[tuple[str, int, int]]:
    """Each way to divide the probes: feature, threshold, the mask of those at or below it.

    The threshold lies half-way in doublings between two probes; of features that divide alike the
    first one counts.
    """
    found: dict[int, tuple[str, int, int]] = {}
    for feature, value in FEATURES.items():
        values = [value(probe.problem) for probe in probes]
        distinct = sorted(set(values))
        for one, two in itertools.pairwise(distinct):
            threshold = max(one, min(two - 1, math.isqrt(one * two)))
            below = sum(1 << number for number, each in enumerate(values) if each <= threshold)
            found.setdefault(below, (feature, threshold, below))
    return list(found.values())


def _narrowed(where: tuple[Bound, ...], bound: Bound) -> tuple[Bound, ...]:
    """`where` with one more bound, joined to one of the same feature."""
    feature, above, most = bound
    for old in where:
        if old.feature == feature:
            above = old.above if above is None else above
            most = old.most if most is None else most
    others = tuple(old for old in where if old.feature != feature)
    return (*others, Bound(feature, above, most))
