"""Search: which config to try next, and which tunables matter. The only user of optuna."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoflash.config import Config, Value

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_FILTERS = threading.Lock()
"""Of the warning filters, which all threads share: devices begin their searches at once."""
SWEEP_LIMIT = 300
"""Spaces up to this size are swept: a sampler would mostly repeat itself (half of TPE's asks at
500 trials of a 1500-point space were repeats)."""
RE_ASKS = 10
"""Where a sampler proposes nothing new so often, in turns an untried neighbour of the best config
and a random one take its place."""


@dataclass(frozen=True, slots=True)
class Axes:
    """What a sampler may choose in one template: its tunables, feasible together or not.

    Attributes:
        tunables: name -> choices, as declared.
        feasible: the configs that no constraint rejects, in the order of the declaration.
    """

    tunables: Mapping[str, Sequence[Value]]
    feasible: Sequence[Config]


class Searcher:
    """Proposes each feasible config of several templates at most once.

    Seeds come first, in their order. After them: a small union of spaces is swept in an order that
    depends on the seed alone; a larger one is sampled by TPE, which learns from `tell`.
    """

    def __init__(
        self,
        templates: Mapping[str, Axes],
        *,
        seeds: Iterable[Config] = (),
        budget: int = 0,
        seed: int = 0,
        sweep_limit: int = SWEEP_LIMIT,
    ) -> None:
        """Prepare a search.

        Args:
            templates: template name -> what there is to choose.
            seeds: configs to propose first; those that are not feasible are left out.
            budget: how many configs will be asked for; a space no larger is swept.
            seed: of the order and of the sampler.
            sweep_limit: a space no larger is swept, whatever the budget.
        """
        feasible = [config for axes in templates.values() for config in axes.feasible]
        self._order = random.Random(seed).sample(feasible, len(feasible))
        self._feasible = frozenset(feasible)
        self._seeds = [config for config in dict.fromkeys(seeds) if config in self._feasible]
        self._proposed: set[Config] = set()
        self._results: dict[Config, float | None] = {}
        self._tunables = {name: axes.tunables for name, axes in templates.items()}
        self._neighbour_next = True
        self._sampler = (
            Sampler(templates, seed) if len(feasible) > max(budget, sweep_limit) else None
        )

    def __len__(self) -> int:
        """How many feasible configs there are."""
        return len(self._feasible)

    @property
    def strategy(self) -> str:
        """The search behind `ask` once the seeds are spent: "sweep" or "tpe"."""
        return "tpe" if self._sampler else "sweep"

    def ask(self) -> Config | None:
        """A config not proposed or told before; None when there is none left."""
        config = self._next_seed() or self._sample() or self._next_neighbour()
        config = config or self._next_in_order()
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
        self._results[config] = latency_us
        if self._sampler and config in self._feasible:
            self._sampler.tell(config, latency_us)

    def _next_seed(self) -> Config | None:
        while self._seeds:
            config = self._seeds.pop(0)
            if config not in self._proposed:
                return config
        return None

    def _sample(self) -> Config | None:
        if self._sampler is None:
            return None
        for _ in range(RE_ASKS):
            config = self._sampler.ask()
            if config not in self._feasible:
                self._sampler.reject(config)
            elif config in self._proposed:
                self._sampler.repeat(config, self._results)
            else:
                return config
        return None

    def _next_neighbour(self) -> Config | None:
        if self._sampler is None:
            return None
        self._neighbour_next = not self._neighbour_next
        timed = {c: t for c, t in self._results.items() if t is not None and c in self._feasible}
        if self._neighbour_next or not timed:
            return None
        best = min(timed, key=lambda config: timed[config])
        near = _neighbours(best, self._tunables[best.template])
        return next((c for c in near if c in self._feasible and c not in self._proposed), None)

    def _next_in_order(self) -> Config | None:
        while self._order:
            config = self._order.pop()
            if config not in self._proposed:
                return config
        return None


class Sampler:
    """Optuna's TPE over the union of the templates' tunables, in memory, by ask and tell."""

    def __init__(self, templates: Mapping[str, Axes], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _FILTERS, warnings.catch_warnings():
            # multivariate, group and constant_liar are marked experimental.
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(
                multivariate=True, group=True, constant_liar=True, seed=seed
            )
            self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._axes = {name: axes.tunables for name, axes in templates.items()}
        self._scales = {
            f"{name}:{tunable}": _scale(choices)
            for name, tunables in self._axes.items()
            for tunable, choices in tunables.items()
        }
        self._open: dict[Config, optuna.trial.Trial] = {}
        self._worst = 0.0

    def ask(self) -> Config:
        """The sampler's proposal, which may be infeasible or a repeat."""
        trial = self._study.ask()
        name = trial.suggest_categorical("template", list(self._axes))
        values = {}
        for tunable in self._axes[name]:
            key = f"{name}:{tunable}"
            values[tunable] = self._scales[key][self._suggest(trial, key)]
        config = Config.of(name, values)
        if config in self._open:
            # Asked before and still out: this trial can say nothing, and TPE ignores a FAIL.
            import optuna

            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._open[config] = trial
        return config

    def tell(self, config: Config, latency_us: float | None) -> None:
        """Report a result; None is a failure."""
        trial = self._open.pop(config, None)
        if trial is None:
            self._add(config, latency_us)
        elif latency_us is None:
            self._prune(trial)
        else:
            self._worst = max(self._worst, latency_us)
            self._study.tell(trial, latency_us)

    def reject(self, config: Config) -> None:
        """Report that a proposal is infeasible."""
        trial = self._open.pop(config, None)
        if trial is not None:
            self._prune(trial)

    def repeat(self, config: Config, results: Mapping[Config, float | None]) -> None:
        """Report that a proposal was tried before, and what came of it unless it is still out."""
        if config in results and config in self._open:
            self.tell(config, results[config])

    def importances(self) -> dict[str, float]:
        """Tunable, after its template and a colon -> its share in what makes configs fast."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluator is marked experimental
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return optuna.importance.get_param_importances(self._study, evaluator=evaluator)

    def _suggest(self, trial: optuna.trial.Trial, key: str) -> int:
        scale = self._scales[key]
        if _is_ordered(scale):
            return trial.suggest_int(key, 0, len(scale) - 1)
        return int(trial.suggest_categorical(key, list(range(len(scale)))))

    def _distribution(self, key: str) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, IntDistribution

        scale = self._scales[key]
        if _is_ordered(scale):
            return IntDistribution(0, len(scale) - 1)
        return CategoricalDistribution(list(range(len(scale))))

    def _prune(self, trial: optuna.trial.Trial) -> None:
        # PRUNED, for TPE ignores FAIL and drifts into what fails (35-62% of its proposals were
        # infeasible then, 10% so); the penalty ranks failures behind everything that ran.
        import optuna

        trial.report(2.0 * self._worst + 1.0, step=0)
        self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def _add(self, config: Config, latency_us: float | None) -> None:
        """A result that no ask of this study led to: a seed, a random config, a stored trial."""
        import optuna

        tunables = self._axes.get(config.template)
        if tunables is None or any(config[name] not in tunables[name] for name in tunables):
            return
        params: dict[str, object] = {"template": config.template}
        distributions: dict[str, BaseDistribution] = {
            "template": optuna.distributions.CategoricalDistribution(list(self._axes))
        }
        for name in tunables:
            key = f"{config.template}:{name}"
            params[key] = self._scales[key].index(config[name])
            distributions[key] = self._distribution(key)
        failed = latency_us is None
        if latency_us is not None:
            self._worst = max(self._worst, latency_us)
        state = optuna.trial.TrialState.PRUNED if failed else optuna.trial.TrialState.COMPLETE
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=params,
                distributions=distributions,
                value=latency_us,
                intermediate_values={0: 2.0 * self._worst + 1.0} if failed else {},
            )
        )


def importances(
    tunables: Mapping[str, Sequence[Value]], results: Sequence[tuple[Config, float]]
) -> dict[str, float]:
    """Each tunable's share in what sets the fastest tenth of the results apart; they add up to 1.

    PED-ANOVA (arXiv 2304.10255), which looks at the distributions of the fast configs and of all:
    it fits no model, and trials that a sampler crowds around good configs do not mislead it as they
    do a variance. All 0 where the fast configs are like the others.

    Args:
        tunables: of one template, those of more than one value.
        results: config and cost; several costs of a config are several results.
    """
    template = results[0][0].template
    sampler = Sampler({template: Axes(tunables, ())}, seed=0)
    for config, cost in results:
        sampler.tell(config, cost)
    shares = sampler.importances()
    return {name: shares.get(f"{template}:{name}", 0.0) for name in tunables}


def _neighbours(config: Config, tunables: Mapping[str, Sequence[Value]]) -> Iterator[Config]:
    """The configs that differ in one tunable, numbers by one step."""
    for name, choices in tunables.items():
        scale = _scale(choices)
        at = scale.index(config[name])
        near = scale[max(0, at - 1) : at + 2] if _is_ordered(scale) else scale
        for value in near:
            if value != config[name]:
                yield Config.of(config.template, {**config, name: value})


def _is_ordered(choices: Sequence[Value]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in choices)


def _scale(choices: Sequence[Value]) -> list[Value]:
    """The choices in the order in which neighbours are alike: numbers by size."""
    if not _is_ordered(choices):
        return list(choices)
    return sorted(choices, key=float)
