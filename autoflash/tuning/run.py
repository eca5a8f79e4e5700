"""Run: what all problems of one tuning run share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from autoflash import build
from autoflash import device as devices
from autoflash.codegen.template import Source, Template
from autoflash.config import Config
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.record import Measurement, Record
from autoflash.tuning.effort import Effort
from autoflash.tuning.ledger import Ledger
from autoflash.tuning.pool import Workers
from autoflash.tuning.strategy import SHIPPED, Strategy

if TYPE_CHECKING:
    from autoflash.codegen.space import Space
    from autoflash.database import Database

NEAREST = 4
"""Winners of other problems that are tried early: beyond a few they repeat each other."""


KILLS = ("crash", "timeout")
"""Outcomes that cost a process."""
DOUBTFUL = "to be run again: "
"""Begins the reason of a failure that may have been another's fault."""
MOST_KILLS = 2
"""Problems on which a config may cost a process before it is barred from those that follow."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One call of `tune`.

    Attributes:
        device: tuned for.
        templates: name -> template, those that may be used.
        database: where everything goes at once.
        effort: the budget.
        policy: id under which times, or predictions, may be compared.
        workers: processes that compile and run candidates.
        seed: of search order and inputs.
        number: of this run in the database.
        jobs: compilations at once.
        environment: versions, as the device's worker reported them.
        compile_s: moving average of the seconds that one compilation takes.
        compiled: source digest -> the compiler's answer: problems of equal traits share sources.
        strategy: how the search goes about it; any but the shipped one is for comparisons.
        others: name -> template, those that are not searched; their winners defend their titles.
        ledger: through which everything is stored in the database.
        kills: config -> the problems on which a process that compiled or ran it had to be killed,
            or died.
    """

    device: Device
    templates: Mapping[str, Template]
    database: Database
    effort: Effort
    policy: str
    workers: Workers
    seed: int
    jobs: int
    number: int | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    compile_s: float = 3.0
    compiled: dict[str, dict[str, Any]] = field(default_factory=dict)
    strategy: Strategy = SHIPPED
    others: Mapping[str, Template] = field(default_factory=dict)
    ledger: Ledger = field(init=False)
    kills: dict[Config, set[Problem]] = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.database)
        self.kills = {}
        for outcome in KILLS:
            for record in self.database.trials(
                device_key=self.device.key, policy=self.policy, outcome=outcome
            ):
                self.note(record)

    def note(self, record: Record) -> None:
        """Remember a config whose process was killed or died."""
        doubtful = record.reason.startswith(DOUBTFUL)
        if record.outcome in KILLS and not doubtful and self.is_current(record):
            self.kills.setdefault(record.config, set()).add(record.problem)

    def is_barred(self, config: Config) -> bool:
        """Whether a config has brought down so many processes that it is tried no more.

        A hang costs a minute, and what hangs on two problems mostly hangs on all of them.
        """
        return len(self.kills.get(config, ())) >= MOST_KILLS

    def accepting(self, problem: Problem) -> list[Template]:
        """The templates that take this problem on this device."""
        refusals = self.refusals(problem)
        return [template for name, template in self.templates.items() if name not in refusals]

    def refusals(self, problem: Problem) -> dict[str, str]:
        """Template -> why it does not take this problem, or cannot be compiled here."""
        every = self.templates.values()
        reasons = ((each.name, refusal(each, problem, self.device)) for each in every)
        return {name: reason for name, reason in reasons if reason is not None}

    def stored(self, problem: Problem) -> list[Record]:
        """Trials of this problem that still hold: same device, same policy, same template text."""
        found = self.database.trials(
            problem=problem, device_key=self.device.key, policy=self.policy
        )
        return [
            record
            for record in found
            if self.is_current(record) and not record.reason.startswith(DOUBTFUL)
        ]

    def is_current(self, record: Record) -> bool:
        """Whether a record's template is one of ours and unchanged since."""
        template = self.templates.get(record.config.template)
        return template is not None and template.digest == record.template_digest

    def template(self, name: str) -> Template:
        """A template of ours, or one of the others."""
        return self.templates.get(name) or self.others[name]

    def best(self, problem: Problem) -> Record | None:
        """The stored winner of this problem on this device, if it still holds.

        It may be of a template that is not searched, which it can be built with here.
        """
        for record in self.database.bests(device_key=self.device.key):
            if (record.problem, record.policy) == (problem, self.policy):
                if self.is_current(record):
                    return record
                other = self.others.get(record.config.template)
                if other is None or other.digest != record.template_digest:
                    return None
                return record if refusal(other, problem, self.device) is None else None
        return None

    def nearest(self, problem: Problem) -> list[Config]:
        """Winners of the most alike problems, this device's before those of its siblings."""
        here = self.database.bests(device_key=self.device.key)
        siblings = self.database.bests(arch=self.device.arch)
        ranked = sorted(
            ((record.device.key != self.device.key, problem.distance(record.problem), number)
             for number, record in enumerate([*here, *siblings])),
        )  # fmt: skip
        records = [*here, *siblings]
        close = (records[number] for _, distance, number in ranked if distance < float("inf"))
        return list(dict.fromkeys(record.config for record in close))[:NEAREST]

    def seeds(self, problem: Problem, templates: Iterable[Template]) -> list[Config]:
        """What to try first: the defaults, the nearest winners, then the declared seeds.

        Winners come before the other seeds since their sources are mostly compiled already.
        Templates take turns, so that a small budget is not spent on the first of them; one that
        gives way to others comes after them.
        """
        defaults: list[Config] = []
        declared: dict[bool, list[list[Config]]] = {False: [], True: []}
        for template in templates:
            default = template.default_config(problem, self.device)
            others = [c for c in template.seed_configs(problem, self.device) if c != default]
            defaults.append(default)
            declared[template.gives_way(problem, self.device) is not None].append(others)
        turns = [
            config
            for gives_way in (False, True)
            for turn in itertools.zip_longest(*declared[gives_way])
            for config in turn
            if config is not None
        ]
        return list(dict.fromkeys([*defaults, *self.nearest(problem), *turns]))

    def record(
        self,
        problem: Problem,
        config: Config,
        outcome: str,
        *,
        source: Source | None = None,
        reason: str = "",
        measurement: Measurement | None = None,
        predicted_us: float | None = None,
        error_ratio: float | None = None,
        resources: Mapping[str, Any] | None = None,
    ) -> Record:
        """A record of this run."""
        return Record(
            problem=problem,
            config=config,
            template_digest=self.template(config.template).digest,
            device=self.device,
            outcome=outcome,
            policy=self.policy,
            reason=reason.partition("\n")[0][:500],
            measurement=measurement,
            predicted_us=predicted_us,
            error_ratio=error_ratio,
            resources=dict(resources or {}),
            source_digest=source.digest if source else "",
            environment=dict(self.environment),
            created=now(),
        )


def refusal(template: Template, problem: Problem, device: Device) -> str | None:
    """Why a template cannot be tuned: it does not take the problem, or lacks its compiler.

    That of a foreign kernel is the device itself.
    """
    reason = template.refusal(problem, device) or build.unavailable(template.language)
    if reason is None and problem.is_foreign and not is_present(device):
        return "the device itself, which is not here: its library compiles for what it finds"
    return reason


def is_present(device: Device) -> bool:
    """Whether kernels can be run on this device, here and now."""
    if not device.is_cuda:
        return device.key == devices.for_arch("cpu").key
    return device.key == devices.native().key


def now() -> str:
    """The time, as records have it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def infeasible(spaces: Iterable[Space]) -> int:
    """How many points of these spaces a constraint rejects."""
    return sum(space.size - len(space) for space in spaces)
