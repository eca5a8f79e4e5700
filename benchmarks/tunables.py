"""What did each tunable buy? Computed from trials, as a table per tunable in Markdown.

python benchmarks/tunables.py benchmarks/nvidia-h200/hopper-trials.csv [TEMPLATE]

A cell compares the best config with a value to the best one without it: 1.08 is a value that the
best config has and without which it would be 8 % slower; 0.93 one that costs 7 % where it must be
used. Cells are geometric means over problems of one head_dim and mask in which there were both;
trials are those of a search, so what was tried with a value is seldom all that could be. Of the
TEMPLATE "*" the templates themselves are compared, each by its best config.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from autoflash.errors import AutoflashError, InvalidInput, UnknownName
from autoflash.problem import Problem

TIMED = ("ok", "slow")
"""Outcomes with a time; a slow one was dropped after a few calls, far behind the best."""
FIXED = ("problem", "template", "outcome", "latency_us")
"""Columns that are no tunables."""
ANY = "*"
"""In place of a template: all of them, as values of a tunable of that name."""

Cell = tuple[int, str]
"""head_dim and mask."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One config that was timed on one problem."""

    problem: str
    latency_us: float
    values: Mapping[str, str]


def main() -> int:
    """Print the tables of one file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trials", type=Path, help="a CSV as in benchmarks/nvidia-h200")
    parser.add_argument("template", nargs="?", help="which one, where the file has several")
    options = parser.parse_args()
    try:
        print(tables(read(options.trials, options.template)))
    except AutoflashError as error:
        print(f"tunables: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path, template: str | None = None) -> list[Trial]:
    """The timed trials of a template; of ANY, trials that say nothing but their template.

    Raises:
        InvalidInput: the file cannot be read, or has trials of several templates and none is named.
        UnknownName: it has none of that template.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        names = {row.get("template", "") for row in rows}
        if template not in (None, ANY, *names):
            raise UnknownName.of("template", template, sorted(names))
        if template is None and len(names) > 1:
            raise InvalidInput(
                f"{path} has trials of {', '.join(sorted(names))}; name one of them after the file."
            )
        return [
            Trial(
                row["problem"],
                float(row["latency_us"]),
                {"template": row["template"]}
                if template == ANY
                else {name: text for name, text in row.items() if name not in FIXED and text},
            )
            for row in rows
            if row["outcome"] in TIMED and template in (None, ANY, row.get("template"))
        ]
    except AutoflashError:
        raise
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InvalidInput(f"{path} is not a table of trials: {error!r}") from None


def tables(trials: Iterable[Trial]) -> str:
    """One table per tunable that was tried with more than one value."""
    listed = list(trials)
    names = dict.fromkeys(name for trial in listed for name in trial.values)
    return "\n\n".join(filter(None, (table(listed, name) for name in names)))


def table(trials: Iterable[Trial], tunable: str) -> str:
    """A row per value, a column per head_dim and mask; empty where there is nothing to compare."""
    found = bought(trials, tunable)
    if not found:
        return ""
    cells = sorted({cell for by_cell in found.values() for cell in by_cell})
    heading = " | ".join(f"{dim} {mask}" for dim, mask in cells)
    lines = [f"| {tunable} | {heading} |", f"|---|{'---:|' * len(cells)}"]
    for value in sorted(found, key=_in_order):
        ratios = (found[value].get(cell) for cell in cells)
        lines.append(f"| {value} | {' | '.join(f'{r:.2f}' if r else '' for r in ratios)} |")
    return "\n".join(lines)


def bought(trials: Iterable[Trial], tunable: str) -> dict[str, dict[Cell, float]]:
    """Value -> head_dim and mask -> time of the best config without it over that of the best with.

    Geometric means over the problems that were timed both with and without the value.
    """
    fastest: dict[str, dict[str, float]] = {}  # problem -> value -> microseconds
    for trial in trials:
        if (value := trial.values.get(tunable)) is not None:
            times = fastest.setdefault(trial.problem, {})
            times[value] = min(trial.latency_us, times.get(value, trial.latency_us))
    ratios: dict[str, dict[Cell, list[float]]] = {}
    for name, times in fastest.items():
        problem = Problem.parse(name)
        cell = (problem.head_dim, "causal" if problem.causal else "full")
        for value, with_it in times.items():
            without = min((us for other, us in times.items() if other != value), default=None)
            if without is not None:
                ratios.setdefault(value, {}).setdefault(cell, []).append(without / with_it)
    return {
        value: {cell: statistics.geometric_mean(found) for cell, found in by_cell.items()}
        for value, by_cell in ratios.items()
    }


def _in_order(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), "")
    except ValueError:
        return (1, 0.0, value)


if __name__ == "__main__":
    sys.exit(main())
