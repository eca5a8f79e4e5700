"""How many points of the spaces that were searched did each constraint reject?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from autoflash.codegen import catalog
from autoflash.record import Record


def infeasible(trials: Iterable[Record]) -> Counter[tuple[str, str]]:
    """(template, broken constraint) -> points, over the problems that each template was tried on.

    By the templates as installed. Listing a space takes a second or two (5 s for the four GPU
    templates on one problem), so that this is done only where it is asked for.

    Args:
        trials: of one device.
    """
    installed = catalog.installed().templates
    found: Counter[tuple[str, str]] = Counter()
    searched = {(r.problem, r.config.template): r.device for r in trials}
    for (problem, name), device in searched.items():
        template = installed.get(name)
        if template is None or template.refusal(problem, device) is not None:
            continue
        for reason, count in template.space(problem, device).rejected.items():
            found[name, reason] += count
    return found
