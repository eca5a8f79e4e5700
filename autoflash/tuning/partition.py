"""Partition: the few leaves of a dispatch table whose worst regret over the probes is least.

Every tree of at most MOST_LEAVES leaves is considered, not only those that a greedy search meets:
with some twenty probes and a threshold between any two of their values there are few enough, since
the worst regret of a tree is the worse one of its two sides, each of which is solved by itself.
"""

from __future__ import annotations

import dataclasses
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
BOUNDED = ("tiles", "seqlen_k")
"""What says whether work fills a device, and whether keys are worth sharing out: the default that a
config was compared with may be another one where these are smaller or larger than at its probes."""
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
    GAIN of the best one's, the one with the fewest leaves is taken. A leaf in which a config serves
    is then bounded by its probes in BOUNDED, half-way to the nearest one outside: beyond, where
    nobody compared it, no leaf speaks.

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
    return tuple(_bounded(leaf, seen) for leaf in search.leaves(chosen, ()))


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

    Of features that divide alike the first one counts.
    """
    found: dict[int, tuple[str, int, int]] = {}
    for feature, value in FEATURES.items():
        values = [value(probe.problem) for probe in probes]
        distinct = sorted(set(values))
        for one, two in itertools.pairwise(distinct):
            threshold = _half_way(one, two)
            below = sum(1 << number for number, each in enumerate(values) if each <= threshold)
            found.setdefault(below, (feature, threshold, below))
    return list(found.values())


def _half_way(one: int, two: int) -> int:
    """A threshold between two values, in doublings: the smaller lies at or below it."""
    return max(one, min(two - 1, math.isqrt(one * two)))


def _bounded(leaf: Leaf, probes: Sequence[Probe]) -> Leaf:
    """The leaf, of a config, as far as its probes reach in BOUNDED."""
    if leaf.config is None:
        return leaf
    where = leaf.where
    for feature in BOUNDED:
        values = [(FEATURES[feature](p.problem), leaf.holds(p.problem)) for p in probes]
        inside = [value for value, holds in values if holds]
        outside = [value for value, holds in values if not holds]
        least, most = min(inside), max(inside)
        below = max((value for value in outside if value < least), default=None)
        beyond = min((value for value in outside if value > most), default=None)
        if below is not None:
            where = _narrowed(where, Bound(feature, _half_way(below, least), None))
        if beyond is not None:
            where = _narrowed(where, Bound(feature, None, _half_way(most, beyond)))
    return dataclasses.replace(leaf, where=where)


def _narrowed(where: tuple[Bound, ...], bound: Bound) -> tuple[Bound, ...]:
    """`where` with one more bound, joined to one of the same feature: both hold."""
    feature, *_ = bound
    same = [old for old in where if old.feature == feature]
    above = max((b.above for b in (*same, bound) if b.above is not None), default=None)
    most = min((b.most for b in (*same, bound) if b.most is not None), default=None)
    joined = Bound(feature, above, most)
    if same:
        return tuple(joined if old is same[0] else old for old in where)
    return (*where, joined)
