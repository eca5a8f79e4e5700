"""Compiling ahead for a device that is not here, as in the build of a container image."""

from __future__ import annotations

from collections.abc import Iterable

from autoflash import build
from autoflash.codegen import catalog
from autoflash.config import Config
from autoflash.device import Device
from autoflash.problem import Problem


def precompile(problems: Iterable[Problem], device: Device) -> list[tuple[Problem, Config | None]]:
    """Compile into the cache what would serve each problem on `device`.

    Returns:
        Each problem with the config compiled for it; None where PyTorch would serve.

    Raises:
        InvalidInput: a problem is none of attention().
    """
    from autoflash.runtime.explain import explain
    from autoflash.runtime.warmup import require_ours

    problems = list(problems)
    require_ours(problems)
    made = []
    for problem in problems:
        config = explain(problem, device).config
        if config is not None:
            template = catalog.installed().get(config.template)
            build.compile_source(template.render(config, problem, device), device)
        made.append((problem, config))
    return made
