"""Model: from the configs timed so far, which untried one is most likely to beat the best?

A Gaussian process over the logarithm of the latency. Every feasible config is known, so that all of
them are ranked and none is proposed twice; samplers that choose tunable by tunable propose what is
infeasible or a repeat most of the time, where constraints leave hundreds of tens of thousands.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from autoflash.config import Config, Value

_REACHES = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
"""How far values of a tunable resemble each other, in its whole range; 16: it does not matter."""
_NOISES = (1e-4, 1e-3, 1e-2)
"""Variance between equal configs, of all that there is."""
_GAIN = 0.01
"""An improvement that counts, likewise in standard deviations: less is noise."""
_FAILED = 0.1
"""A failure counts as so much slower (in logarithms) than the slowest."""
_HOPELESS = 0.25
"""What is slower than the best by this much counts as if it were no slower: how bad a bad config is
says nothing about which of the good ones is best."""
_REFIT = 1.15
"""Reaches are chosen anew when there are so many times more results than the last time."""
_ROWS, _RANKED = 400, 4000
"""The fastest results that it learns from and untried configs that it ranks at most: an ask stays
below 0.1 s."""


class Model:
    """Ranks untried configs by their expected improvement over the best so far."""

    def __init__(
        self, tunables: Mapping[str, Mapping[str, Sequence[Value]]], feasible: Iterable[Config]
    ) -> None:
        """Place the configs in a space in which near ones are alike.

        Args:
            tunables: template -> tunable -> choices.
            feasible: all configs that there are.
        """
        import numpy

        self._np: Any = numpy
        self._configs = list(feasible)
        self._index = {config: number for number, config in enumerate(self._configs)}
        names = list(tunables)
        self._template = numpy.array([names.index(c.template) for c in self._configs], dtype=int)
        columns: list[Any] = []
        self._of_tunable: list[list[int]] = []
        for name in names:
            of_template = [config.template == name for config in self._configs]
            for tunable, choices in tunables[name].items():
                values = [
                    config[tunable] if mine else None
                    for config, mine in zip(self._configs, of_template, strict=True)
                ]
                made = _columns(choices, values)
                self._of_tunable.append([len(columns) + number for number in range(len(made))])
                columns += [numpy.array(column) for column in made]
        empty = numpy.zeros((len(self._configs), 1))
        self._places = numpy.stack(columns, axis=1) if columns else empty
        self._reaches = [1.0] * len(self._of_tunable)
        self._noise = _NOISES[1]
        self._fitted = 0

    def next(
        self, results: Mapping[Config, float | None], proposed: Collection[Config]
    ) -> Config | None:
        """The most promising config that was not proposed; None if there is none, or no time yet.

        Args:
            results: latency of what was tried; None for a failure.
            proposed: what was proposed; where there is no result, it is taken to be as expected.
        """
        np = self._np
        left = [i for i, config in enumerate(self._configs) if config not in proposed][:_RANKED]
        times = {self._index[c]: math.log(t) for c, t in results.items() if t is not None}
        if not left or not times:
            return None
        slowest, fastest = max(times.values()), min(times.values())
        failed = [self._index[c] for c, t in results.items() if t is None]
        times.update((i, slowest + _FAILED) for i in failed)
        rows = sorted(times, key=lambda i: times[i])[:_ROWS]
        y = np.array([min(times[i], fastest + _HOPELESS) for i in rows])
        z = (y - y.mean()) / max(float(y.std()), 0.01)
        if len(rows) >= _REFIT * self._fitted:
            self._fit(rows, z)
            self._fitted = len(rows)
        guess = self._kernel(left, rows) @ self._solve(rows, z)
        # How uncertain a guess is depends on places alone: what is under way counts as known.
        out = [self._index[c] for c in proposed if c in self._index and c not in results]
        known = [*rows, *out]
        half = np.linalg.solve(self._factor(known), self._kernel(known, left))
        sigma = np.sqrt(np.maximum(1.0 - (half * half).sum(axis=0), 1e-9))
        u = (float(z.min()) - _GAIN - guess) / sigma
        below = np.array([0.5 + 0.5 * math.erf(x / math.sqrt(2.0)) for x in u])
        density = np.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi)
        return self._configs[left[int(np.argmax(sigma * (u * below + density)))]]

    def _solve(self, rows: Sequence[int], z: Any) -> Any:
        factor = self._factor(rows)
        return self._np.linalg.solve(factor.T, self._np.linalg.solve(factor, z))

    def _factor(self, rows: Sequence[int]) -> Any:
        np = self._np
        return np.linalg.cholesky(self._kernel(rows, rows) + self._noise * np.eye(len(rows)))

    def _kernel(self, one: Sequence[int], two: Sequence[int]) -> Any:
        """How alike configs are; those of different templates are not."""
        np = self._np
        scale = np.zeros(self._places.shape[1])
        for columns, reach in zip(self._of_tunable, self._reaches, strict=True):
            scale[columns] = 1.0 / reach
        a, b = self._places[one] * scale, self._places[two] * scale
        apart = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :] - 2.0 * a @ b.T
        return _alike(np, apart, self._same(one, two))

    def _same(self, one: Sequence[int], two: Sequence[int]) -> Any:
        return self._template[one][:, None] == self._template[two][None, :]

    def _fit(self, rows: Sequence[int], z: Any) -> None:
        """Choose the reach of each tunable, one after the other, that makes the results likely."""
        np = self._np
        places, same = self._places[rows], self._same(rows, rows)
        apart = [
            sum((places[:, [column]] - places[:, column]) ** 2 for column in columns)
            for columns in self._of_tunable
        ]
        total = sum(a / r**2 for a, r in zip(apart, self._reaches, strict=True)) + np.zeros(
            same.shape
        )
        best = self._likelihood(total, same, z, self._noise)
        for number, one in enumerate(apart):
            if not np.any(one):
                continue
            others = total - one / self._reaches[number] ** 2
            for reach in _REACHES:
                changed = others + one / reach**2
                found = self._likelihood(changed, same, z, self._noise) - _surprise(reach)
                if found > best - _surprise(self._reaches[number]) + 1e-9:
                    best = found + _surprise(reach)
                    self._reaches[number], total = reach, changed
        likely = {noise: self._likelihood(total, same, z, noise) for noise in _NOISES}
        self._noise = max(_NOISES, key=lambda noise: likely[noise])

    def _likelihood(self, apart: Any, same: Any, z: Any, noise: float) -> float:
        np = self._np
        factor = np.linalg.cholesky(_alike(np, apart, same) + noise * np.eye(len(z)))
        half = np.linalg.solve(factor, z)
        return float(-0.5 * half @ half - np.log(np.diag(factor)).sum())


def _alike(np: Any, apart: Any, same: Any) -> Any:
    return np.exp(-np.sqrt(np.maximum(apart, 0.0))) * same


def _surprise(reach: float) -> float:
    """What speaks against a reach before there are results: few tunables do not matter at all."""
    return 0.25 * math.log(reach) ** 2


def _columns(choices: Sequence[Value], values: Sequence[Value | None]) -> list[list[float]]:
    """Coordinates of one tunable: a scale from 0 to 1 for numbers; else all choices 1 apart."""
    scale = in_order(choices)
    if len(scale) < 2:
        return []
    if is_ordered(choices):
        step = 1.0 / (len(scale) - 1)
        return [[0.0 if value is None else step * scale.index(value) for value in values]]
    return [[math.sqrt(0.5) * (value == choice) for value in values] for choice in scale]


def is_ordered(choices: Sequence[Value]) -> bool:
    """Whether choices are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in choices)


def in_order(choices: Sequence[Value]) -> list[Value]:
    """The choices in the order in which neighbours are alike: numbers by size."""
    return sorted(choices, key=float) if is_ordered(choices) else list(choices)
