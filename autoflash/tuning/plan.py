"""Plan: how many configs a run would try, what rejects the others, and how long it would take."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoflash import build, settings
from autoflash.codegen.catalog import Catalog, installed
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.record import Record
from autoflash.tuning import effort as efforts
from autoflash.tuning.effort import Effort
from autoflash.tuning.predict import MODEL
from autoflash.tuning.run import is_present, refusal
from autoflash.tuning.timing import policy_for

if TYPE_CHECKING:
    from autoflash.database import Database

COMPILE_S = {"python": 0.9, "cpp": 3.0, "cuda": 13.0, "flex": 5.0}
"""Seconds of one compilation on one core, where no record tells."""
_EVALUATE_S = 0.3
_START_S = 6.0  # a worker that imports torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePlan:
    """One template's part in a plan.

    Attributes:
        template: its name.
        size: combinations of its tunables.
        feasible: those that no constraint rejects.
        rejected: constraint -> combinations that it was the first to reject.
        stored: feasible configs that already have a current record.
        compile_s: median seconds of one compilation, by records, else a guess.
    """

    template: str
    size: int
    feasible: int
    rejected: Counter[str]
    stored: int
    compile_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What tuning one problem would do.

    Attributes:
        problem: which.
        templates: those that accept it.
        refused: template -> why it does not, or cannot be compiled here.
        stored: feasible configs that already have a current record.
        trials: configs that would be tried now.
        seconds: about how long that would take.
    """

    problem: Problem
    templates: tuple[TemplatePlan, ...]
    refused: Mapping[str, str]
    stored: int
    trials: int
    seconds: float


def plan(
    problems: Sequence[Problem],
    device: Device,
    *,
    templates: Sequence[str] | None = None,
    effort: str | Effort = "normal",
    max_trials: int | None = None,
    database: Database | None = None,
    catalog: Catalog | None = None,
    present: bool | None = None,
) -> list[Plan]:
    """What `tune` would do with the same arguments; touches no device and compiles nothing.

    Args:
        problems: what to tune.
        device: what for.
        templates: names of those that may be used; None is all.
        effort: the budget.
        max_trials: per problem, in place of the effort's.
        database: tells what is stored already and how long compilations take; None: nothing is.
        catalog: of templates; None is the installed one.
        present: whether configs would be run, or only compiled and ranked; None: look.

    Raises:
        UnknownName: there is no such template or effort.
    """
    catalog = catalog or installed()
    chosen = [catalog.get(name) for name in templates] if templates else None
    budget = efforts.of(effort)
    present = is_present(device) if present is None else present
    policy = policy_for(device).id if present else MODEL
    most = max_trials or (budget.trials if present else budget.compiles)
    seconds = budget.seconds if present else budget.compile_seconds
    languages = {template.language for template in chosen or catalog.templates.values()}
    jobs = build.jobs_within_memory(settings.get().jobs, languages, device)
    plans: list[Plan] = []
    for problem in problems:
        parts, refused = [], {}
        for template in chosen or catalog.templates.values():
            reason = refusal(template, problem, device)
            if reason is not None:
                refused[template.name] = reason
                continue
            space = template.space(problem, device)
            known: list[Record] = []
            if database is not None:
                known = database.trials(
                    problem=problem, device_key=device.key, policy=policy, template=template.name
                )
            feasible = set(space.configs)
            current = {r.config for r in known if r.template_digest == template.digest}
            times = [r.resources["compile_s"] for r in known if r.resources.get("compile_s")]
            parts.append(
                TemplatePlan(
                    template=template.name,
                    size=space.size,
                    feasible=len(space),
                    rejected=space.rejected,
                    stored=len(current & feasible),
                    compile_s=statistics.median(times) if times else COMPILE_S[template.language],
                )
            )
        feasible_count = sum(part.feasible for part in parts)
        stored = sum(part.stored for part in parts)
        trials = max(0, min(most, feasible_count) - stored)
        estimate = 0.0
        if trials:
            weighted = sum(part.compile_s * part.feasible for part in parts) / feasible_count
            # A foreign kernel is compiled in the process that runs it, one at a time.
            compiling = trials * weighted / (1 if problem.is_foreign else jobs)
            running = trials * _EVALUATE_S if present else 0.0
            # On a GPU the two overlap; on a CPU they take turns.
            overlap = device.is_cuda and not problem.is_foreign
            estimate = max(compiling, running) if overlap else compiling + running
            finals_s = budget.finalist_ms(device) / 1e3 * (budget.finalists + 2)
            estimate += finals_s if present else 0.0
            estimate = min(estimate, seconds) if seconds is not None else estimate
            estimate += 0.0 if plans else _START_S
        plans.append(
            Plan(
                problem=problem,
                templates=tuple(parts),
                refused=refused,
                stored=stored,
                trials=trials,
                seconds=estimate,
            )
        )
    return plans
