"""Defaults: what serves a problem of which no record tells, and in which order templates do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from autoflash.codegen.template import Template
from autoflash.config import Config
from autoflash.device import Device
from autoflash.problem import Problem

FAMILIES = ("cuda", "gluon", "triton", "cpp")
"""Which default is tried first where several templates accept: the more specialised, then by name.

Families that are not listed come last, and after them templates that say that they are slow here
(`yields`).
"""


class Default(NamedTuple):
    """What a template serves without a record: what that is, and whether others go first."""

    config: Config
    what: str
    gives_way: bool


def place(template: Template) -> tuple[int, str]:
    """Sorts templates into the order in which their defaults are tried."""
    family = template.name.split("/")[0]
    rank = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
    return rank, template.name


def default_of(template: Template, problem: Problem, device: Device) -> Default | None:
    """What a template serves without a record; None if it refuses."""
    if template.refusal(problem, device) is not None:
        return None
    gives_way = template.gives_way(problem, device)
    after = f"; others go first: {gives_way}" if gives_way else ""
    config = template.default_config(problem, device)
    if template.broken(config, problem, device) is None:
        return Default(config, f"the template's default{after}", bool(gives_way))
    seeds = template.seed_configs(problem, device)
    what = f"the template's first seed{after}"
    return Default(seeds[0], what, bool(gives_way)) if seeds else None


def defaults(templates: Iterable[Template], problem: Problem, device: Device) -> list[Config]:
    """The defaults of those that accept the problem, in the order in which they are tried."""
    found = (default_of(each, problem, device) for each in sorted(templates, key=place))
    return [each.config for each in sorted(filter(None, found), key=lambda each: each.gives_way)]


def is_first_default(
    config: Config, templates: Iterable[Template], problem: Problem, device: Device
) -> bool:
    """Whether a config is what serves the problem without records."""
    return defaults(templates, problem, device)[:1] == [config]
