"""Sampler: Optuna, to compare our search with and to say which tunables matter; its only user."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from autoflash.config import Config, Value
from autoflash.tuning.model import in_order, is_ordered

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

RE_ASKS = 10
"""Where a sampler proposes nothing new so often, a random config takes its place: half of TPE's
asks at 500 trials of a 1500-point space were repeats."""


class Sampler:
    """An Optuna sampler over the union of the templates' tunables, in memory.

    It knows the choices of each tunable, not which of their combinations are feasible.
    """

    def __init__(
        self, kind: str, tunables: Mapping[str, Mapping[str, Sequence[Value]]], seed: int
    ) -> None:
        """Prepare a study.

        Args:
            kind: a key of KINDS.
            tunables: template -> tunable -> choices.
            seed: of the sampler.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            # Some samplers, and options of others, are marked experimental.
            warnings.simplefilter("ignore")
            self._study = optuna.create_study(sampler=_made(kind, seed))
        self._axes = tunables
        self._scales = {
            f"{name}:{tunable}": in_order(choices)
            for name, tunables in self._axes.items()
            for tunable, choices in tunables.items()
        }
        self._open: dict[Config, optuna.trial.Trial] = {}
        self._worst = 0.0

    def propose(
        self,
        feasible: Collection[Config],
        proposed: Collection[Config],
        results: Mapping[Config, float | None],
    ) -> Config | None:
        """A feasible config not proposed before; None where none of RE_ASKS asks gave one.

        Args:
            feasible: what may be proposed.
            proposed: what was, or was told.
            results: what is known of them; None for a failure.
        """
        for _ in range(RE_ASKS):
            config = self.ask()
            if config not in feasible:
                self.reject(config)
            elif config in proposed:
                self.repeat(config, results)
            else:
                return config
        return None

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
        if is_ordered(scale):
            return trial.suggest_int(key, 0, len(scale) - 1)
        return int(trial.suggest_categorical(key, list(range(len(scale)))))

    def _distribution(self, key: str) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, IntDistribution

        scale = self._scales[key]
        if is_ordered(scale):
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
    sampler = Sampler("tpe", {template: tunables}, seed=0)
    for config, cost in results:
        sampler.tell(config, cost)
    shares = sampler.importances()
    return {name: shares.get(f"{template}:{name}", 0.0) for name in tunables}


def _made(kind: str, seed: int) -> BaseSampler:
    from optuna import samplers

    if kind == "tpe":
        return samplers.TPESampler(seed=seed)
    if kind == "multivariate-tpe":
        return samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
    return samplers.GPSampler(seed=seed)


KINDS = ("tpe", "multivariate-tpe", "gp")
"""As Optuna makes it; with dependencies between tunables and between trials under way; Optuna's
Gaussian process, which needs scipy."""
