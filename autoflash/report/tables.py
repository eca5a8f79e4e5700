"""Which tables does a chapter have? Used by the page and, the short ones, by the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoflash.record import OUTCOMES, Record
from autoflash.report.conditions import READINGS, Conditions
from autoflash.report.findings import Chapter, Findings
from autoflash.report.gates import GATES, Funnel
from autoflash.report.progress import Search, moment
from autoflash.report.table import Table, figure, span, times
from autoflash.report.tunables import Tuned


def problems(chapter: Chapter, findings: Findings) -> Table:
    """One row per problem: its search and its winner, without the config."""
    columns = ("problem", ">trials", ">timed", ">near after", ">us", ">TFLOPS", ">of ceiling",
               ">vs default", ">vs PyTorch", "winner", "kind")  # fmt: skip
    rows = [_problem(search, chapter, findings) for search in chapter.searches]
    return Table("Problems", columns, tuple(rows))


def _problem(search: Search, chapter: Chapter, findings: Findings) -> tuple[str, ...]:
    winner, problem = search.winner, search.problem
    us = winner.latency_us if winner else search.best_us
    rate = problem.tflops(us) if us else None
    most = None
    if problem.bytes and problem.flops:
        most = chapter.ceilings.attainable_tflops(problem.dtype, problem.flops / problem.bytes)
    kind = "no winner"
    if winner is not None:
        kind = "measured" if winner.is_measured else "predicted"
        kind += "" if findings.is_current(winner) else ", old"
    versus = f"{times(winner.torch_us, us)} {winner.torch_provider or ''}" if winner else ""
    return (
        problem.name,
        str(search.count) if search.count else "",
        str(len(search.points)) if search.count else "",
        str(search.arrived or ""),
        figure(us),
        figure(rate),
        f"{rate / most:.0%}" if rate and most else "",
        times(winner.default_us, us) if winner else "",
        versus.strip() if winner and winner.torch_us else "",
        winner.config.template if winner else "",
        kind,
    )


def winners(chapter: Chapter) -> Table:
    """One row per winner: its times, its state of the device, its config."""
    columns = ("problem", ">us", ">p20", ">p80", ">calls", ">MHz", ">W", ">°C", "throttled",
               ">error", ">registers", ">smem KiB", ">compile s", "date", "config")  # fmt: skip
    return Table("Winners", columns, tuple(_winner(record) for record in chapter.winners))


def _winner(record: Record) -> tuple[str, ...]:
    timed, used = record.measurement, record.resources
    smem = used.get("smem_bytes")
    throttled = timed.throttled if timed else None
    return (
        record.problem.name,
        figure(record.latency_us),
        figure(timed.p20_us if timed else None),
        figure(timed.p80_us if timed else None),
        str(timed.count) if timed else "",
        figure(timed.clock_mhz if timed else None),
        figure(timed.power_w if timed else None),
        figure(timed.temperature_c if timed else None),
        {True: "yes", False: "no"}.get(throttled, "") if throttled is not None else "",
        f"{record.error_ratio:.2f}" if record.error_ratio is not None else "",
        str(used.get("registers") or ""),
        figure(smem / 1024) if smem is not None else "",
        figure(used.get("compile_s")),
        record.created[:10],
        str(record.config),
    )


def gates(funnel: Funnel) -> Table:
    """One row per gate."""
    rows = [
        (gate.name, str(gate.reached), str(gate.stopped), str(gate.reached - gate.stopped),
         GATES[gate.name])
        for gate in funnel.gates
    ]  # fmt: skip
    return Table(
        "Gates", ("gate", ">reached it", ">stopped", ">passed", "what passes"), tuple(rows)
    )


def reasons(funnel: Funnel, most: int) -> Table:
    """The most frequent reasons."""
    rows = [
        (each.text, str(each.count), each.gate, OUTCOMES[each.outcome], each.template)
        for each in funnel.reasons[:most]
    ]
    return Table(
        "Reasons", ("reason", ">configs", "gate", "what happened", "template"), tuple(rows)
    )


def values(tuned: Tuned) -> Table:
    """One row per tunable: importance, and the price of each value."""
    rows = [
        (
            each.name,
            f"{each.importance:.2f}" if each.importance is not None else "",
            figure(max(each.prices.values(), default=None)),
            ", ".join(f"{value}: {price:.2f}" for value, price in each.prices.items()),
        )
        for each in tuned.tunables
    ]
    columns = ("tunable", ">importance", ">dearest value", "best time with each value")
    return Table(tuned.template, columns, tuple(rows))


def readings(found: Conditions) -> Table:
    """One row per sensor."""
    columns = ("reading", ">records", ">least", ">p20", ">median", ">p80", ">most")
    rows = [
        (READINGS[name], str(s.count), *map(figure, (s.least, s.p20, s.median, s.p80, s.most)))
        for name, s in found.spreads.items()
    ]
    return Table("Clock, power and temperature", columns, tuple(rows))


def environment(found: Conditions) -> Table:
    """One row per fact; where records differ, each value with how many have it."""
    rows = []
    for name, counted in found.facts.items():
        text = next(iter(counted), "")
        if len(counted) > 1:
            text = ", ".join(f"{value} ({count} records)" for value, count in counted.most_common())
        rows.append((name, text))
    return Table("Environment", ("what", "version"), tuple(rows))


def device(chapter: Chapter) -> Table:
    """One row per fact about the device."""
    facts = chapter.device.to_dict()
    rows = [
        (name, " ".join(value) if isinstance(value, list) else str(value))
        for name, value in facts.items()
        if value not in (0, 0.0, [], "")
    ]
    return Table("Device", ("fact", "value"), (*rows, ("key", chapter.device.key)))


def runs(chapter: Chapter) -> Table:
    """One row per run."""
    rows = [_run(each) for each in chapter.runs]
    columns = (">run", "began", ">took", "status", ">seed", "command", "limits")
    return Table("Runs", columns, tuple(rows))


def _run(run: Mapping[str, Any]) -> tuple[str, ...]:
    began, ended = moment(run["started"]), moment(run["ended"] or "")
    return (
        str(run["id"]),
        str(run["started"]).replace("T", " ").removesuffix("Z"),
        span((ended - began).total_seconds()) if began and ended else "",
        str(run["status"]),
        str(run["seed"]),
        str(run["command"]),
        ", ".join(f"{name} {value}" for name, value in run["budget"].items() if value is not None),
    )
