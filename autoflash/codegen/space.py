"""Space: the configs of a template that are feasible for one problem on one device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from autoflash.config import Config


@dataclass(frozen=True, slots=True)
class Space:
    """The feasible configs, and why the others are not.

    Attributes:
        template: the template's name.
        configs: every feasible config, in the order of the declaration.
        size: combinations of the tunables before any constraint.
        rejected: broken constraint -> how many combinations it was the first to reject.
    """

    template: str
    configs: tuple[Config, ...]
    size: int
    rejected: Counter[str]

    def __len__(self) -> int:
        return len(self.configs)
