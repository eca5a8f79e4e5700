"""Dispatch tables as `generalise` and `show --regret` print them, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoflash.cli.output import remark, say, shortened, table, write_json
from autoflash.cli.results import (
    EXIT_INVALID,
    EXIT_OK,
    EXIT_PARTIAL,
    EXIT_UNIMPROVED,
    installed_digests,
)
from autoflash.dispatch_table import STRATEGIES, TURNS, DispatchTable

if TYPE_CHECKING:
    from autoflash.device import Device
    from autoflash.report import Table
    from autoflash.tuning.generalise import Generalised

GOAL_MEAN, GOAL_WORST = 0.02, 0.06
"""Regret of a table over the shapes held out that is good enough: geometric mean, and worst."""
_WHAT = {
    "table": "the table",
    "nearest": "the nearest winner",
    "default": "the template's default",
}


def shown(tables: Sequence[DispatchTable], as_json: bool) -> None:
    """The answer of `show --regret`."""
    digests = installed_digests()
    if as_json:
        write_json([table_dict(each, digests) for each in tables])
        return
    if not tables:
        say("no dispatch tables; `autoflash generalise` makes them from what was tuned")
    for number, each in enumerate(tables):
        if number:
            say()
        _leaves(each, digests)
        _regrets(each)


def generalised(results: Sequence[Generalised], as_json: bool) -> None:
    """The end of `generalise`."""
    digests = installed_digests()
    if as_json:
        write_json(
            [
                {
                    "family": result.family.name,
                    "status": result.status,
                    "measured": result.measured,
                    "wanted": result.wanted,
                    "reason": result.reason,
                    "table": table_dict(result.table, digests) if result.table else None,
                }
                for result in results
            ]
        )
        return
    shown([result.table for result in results if result.table], as_json)
    for result in results:
        if result.reason:
            count = f"{result.measured} of {result.wanted} shapes measured"
            remark(f"{result.family.name}: {result.status}: {count}; {result.reason}")


def exit_code(results: Sequence[Generalised]) -> int:
    """The exit code of `generalise`."""
    statuses = {result.status for result in results}
    if statuses == {"invalid"}:
        return EXIT_INVALID
    if statuses & {"partial", "invalid"}:
        return EXIT_PARTIAL
    return EXIT_OK if "improved" in statuses else EXIT_UNIMPROVED


def summary(each: DispatchTable) -> str:
    """A table in one line."""
    found = each.regret("table", held_out=True)
    regret = f"{found.mean:.1%} on average, {found.worst:.1%} at worst" if found.shapes else "none"
    return (
        f"{each.family.name}, {each.created[:10]}, {len(each.leaves)} leaves; "
        f"regret on {found.shapes} shapes held out: {regret}"
    )


def overview(
    tables: Sequence[DispatchTable], digests: Mapping[str, str], device: Device, policy: str
) -> Table | None:
    """What the tables of a device and policy lose, for its report: one row per family."""
    from autoflash.report import Table

    made = [t for t in tables if (t.device.key, t.policy) == (device.key, policy + TURNS)]
    rows = []
    for each in made:
        old = any(not each.is_current(c.template, digests.get(c.template)) for c in each.configs)
        held = [each.regret(strategy, held_out=True) for strategy in STRATEGIES]
        cells = [f"{r.mean:.1%} / {r.worst:.1%}" if r.shapes else "" for r in held]
        goal = ("met" if _is_met(each) else "missed") if held[0].shapes else ""
        name = each.family.name + (", of an older template" if old else "")
        rows.append((name, str(held[0].shapes), *cells, goal, held[0].where))
    columns = ("family", ">shapes", *(f">{_WHAT[strategy]}" for strategy in STRATEGIES), "goal",
               "worst shape")  # fmt: skip
    title = (
        "What dispatch tables lose to the best config measured, over shapes held out: mean / worst "
        f"(goal: {GOAL_MEAN:.0%} / {GOAL_WORST:.0%})"
    )
    return Table(title, columns, tuple(rows)) if rows else None


def table_dict(each: DispatchTable, digests: Mapping[str, str]) -> dict[str, Any]:
    """A table for JSON, with what follows from it beside it."""
    regrets = {
        name: {s: each.regret(s, held_out=held_out).to_dict() for s in STRATEGIES}
        for name, held_out in (("held_out", True), ("chosen_by", False))
    }
    return {
        "family": each.family.name,
        "device": each.device.slug,
        "goal": {"mean": GOAL_MEAN, "worst": GOAL_WORST, "met": _is_met(each)},
        "regret": regrets,
        "current": {
            name: each.is_current(name, digests.get(name)) for name in sorted(each.digests)
        },
        "table": each.to_dict(),
    }


def _leaves(each: DispatchTable, digests: Mapping[str, str]) -> None:
    configs = [each.config_of(leaf) for leaf in each.leaves]
    texts, notes = shortened(configs)
    rows = []
    for leaf, config, text in zip(each.leaves, configs, texts, strict=True):
        name = config.template if config else "the default"
        current = config is None or each.is_current(name, digests.get(name))
        rows.append(
            (
                str(leaf),
                name + ("" if current else ", old"),
                leaf.probes,
                f"{leaf.mean:.1%}",
                f"{leaf.worst:.1%}",
                text,
            )
        )
    title = f"{each.family.name} on {each.device.name}, {each.created[:10]}"
    columns = ("where", "serves", ">probes", ">mean", ">worst", "config")
    table(title, columns, rows)
    for note in notes:
        say(note)
    if any("old" in row[1] for row in rows):
        say("old: the template has changed since, so the leaf is not served; generalise again.")


def _regrets(each: DispatchTable) -> None:
    rows = []
    for strategy in STRATEGIES:
        held, seen = (each.regret(strategy, held_out=held_out) for held_out in (True, False))
        where = f"{held.where}" if held.shapes else ""
        held_cells = (f"{held.mean:.1%}", f"{held.worst:.1%}") if held.shapes else ("-", "-")
        rows.append((_WHAT[strategy], *held_cells, f"{seen.mean:.1%}", f"{seen.worst:.1%}", where))
    held_out = sum(probe.held_out for probe in each.probes)
    title = (
        f"Regret against the best of {len(each.configs)} configs at each shape: {held_out} shapes "
        f"held out, {len(each.probes) - held_out} to choose by"
    )
    columns = ("serving by", ">held out: mean", ">worst", ">chosen by: mean", ">worst",
               "worst shape held out")  # fmt: skip
    table(title, columns, rows)
    if held_out:
        verdict = "met" if _is_met(each) else "missed"
        say(f"goal: {GOAL_MEAN:.0%} mean, {GOAL_WORST:.0%} worst over those held out: {verdict}")


def _is_met(each: DispatchTable) -> bool:
    found = each.regret("table", held_out=True)
    return bool(found.shapes) and found.mean <= GOAL_MEAN and found.worst <= GOAL_WORST
