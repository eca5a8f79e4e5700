"""Search: which config to try next."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoflash.config import Config, Value
from autoflash.tuning.model import Model
from autoflash.tuning.sampler import Sampler

FROM = 6
"""Results that the model needs before it says more than chance."""
SAMPLERS = ("model", "random", "declared", "tpe", "multivariate-tpe", "gp")
"""Who proposes once the seeds are spent: the shipped model, chance, the order of the declaration,
or one of Optuna's samplers (tuning.sampler)."""


@dataclass(frozen=True, slots=True)
class Axes:
    """What there is to choose in one template.

    Attributes:
        tunables: name -> choices, as declared.
        feasible: the configs that no constraint rejects, in the order of the declaration.
    """

    tunables: Mapping[str, Sequence[Value]]
    feasible: Sequence[Config]


class Searcher:
    """Proposes each feasible config of several templates at most once.

    Seeds come first, in their order; then what a model of the results so far expects most of; and
    where that has nothing to say, configs in an order that depends on the seed alone.
    """

    def __init__(
        self,
        templates: Mapping[str, Axes],
        *,
        seeds: Iterable[Config] = (),
        seed: int = 0,
        sampler: str = "model",
    ) -> None:
        """Prepare a search.

        Args:
            templates: template name -> what there is to choose.
            seeds: configs to propose first; those that are not feasible are left out.
            seed: of the order and of the sampler.
            sampler: one of SAMPLERS.
        """
        assert sampler in SAMPLERS
        feasible = [config for axes in templates.values() for config in axes.feasible]
        self._feasible = frozenset(feasible)
        self._seeds = [config for config in dict.fromkeys(seeds) if config in self._feasible]
        self._proposed: set[Config] = set()
        self._results: dict[Config, float | None] = {}
        # Taken from the end.
        self._order = feasible[::-1]
        if sampler != "declared":
            random.Random(seed).shuffle(self._order)
        tunables = {name: axes.tunables for name, axes in templates.items()}
        self._model = Model(tunables, feasible) if sampler == "model" else None
        by_optuna = sampler not in ("model", "random", "declared")
        self._sampler = Sampler(sampler, tunables, seed) if by_optuna and feasible else None

    def __len__(self) -> int:
        """How many feasible configs there are."""
        return len(self._feasible)

    def ask(self) -> Config | None:
        """A config not proposed or told before; None when there is none left."""
        config = self._next_seed() or self._promising() or self._sampled() or self._next_in_order()
        if config is not None:
            self._proposed.add(config)
        return config

    def tell(self, config: Config, latency_us: float | None) -> None:
        """Report what became of a config, asked for or not.

        Args:
            config: which.
            latency_us: its time; None if it failed.
        """
        self._proposed.add(config)
        if config in self._feasible:
            self._results[config] = latency_us
            if self._sampler is not None:
                self._sampler.tell(config, latency_us)

    def _next_seed(self) -> Config | None:
        while self._seeds:
            config = self._seeds.pop(0)
            if config not in self._proposed:
                return config
        return None

    def _promising(self) -> Config | None:
        if self._model is None or len(self._results) < FROM:
            return None
        return self._model.next(self._results, self._proposed)

    def _sampled(self) -> Config | None:
        if self._sampler is None:
            return None
        return self._sampler.propose(self._feasible, self._proposed, self._results)

    def _next_in_order(self) -> Config | None:
        while self._order:
            config = self._order.pop()
            if config not in self._proposed:
                return config
        return None
