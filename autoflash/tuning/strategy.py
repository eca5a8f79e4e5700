"""Strategy: the ways in which a search can go about it; one is shipped, the others are compared."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class Strategy:
    """How configs are proposed and timed.

    Attributes:
        name: what `autoflash simulate --strategies` takes.
        summary: one line.
        sampler: who proposes, once the seeds are spent (tuning.search.SAMPLERS).
        seeds: whether defaults, winners of near problems and declared seeds come first.
        races: whether a config is dropped as soon as it has lost.
    """

    name: str
    summary: str
    sampler: str
    seeds: bool = True
    races: bool = True

    @property
    def unavailable(self) -> str | None:
        """What is missing here for it, or None."""
        if self.sampler == "gp" and find_spec("scipy") is None:
            return (
                "scipy is not installed, which Optuna's Gaussian process needs: pip install scipy"
            )
        return None

    @property
    def varies(self) -> bool:
        """Whether it depends on the seed."""
        return self.sampler != "declared"


SHIPPED = Strategy("default", "as `tune` searches: seeds, the model, racing", "model")
STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        SHIPPED,
        Strategy("seeded-random", "seeds, then by chance; racing", "random"),
        Strategy(
            "seeded-tpe",
            "seeds, then Optuna's TPE with dependencies and trials under way; racing",
            "multivariate-tpe",
        ),
        Strategy("seeded-gp", "seeds, then Optuna's Gaussian process; racing; needs scipy", "gp"),
        Strategy("model", "the model without seeds; racing", "model", seeds=False),
        Strategy("tpe", "Optuna's TPE as it comes; no seeds, no racing", "tpe", False, False),
        Strategy("random", "by chance; no seeds, no racing", "random", False, False),
        Strategy("sweep", "in the order of the declaration; no racing", "declared", False, False),
    )
}
"""Name -> strategy. All go through the same loop: the same compilers, checks and clocks."""
