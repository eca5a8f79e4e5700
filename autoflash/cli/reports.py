"""What the other commands print: plans, comparisons, built kernels, the state of the machine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoflash.cli.output import duration, kernel, remark, say, table, us, write_json
from autoflash.config import Config
from autoflash.device import Device
from autoflash.errors import InvalidInput
from autoflash.problem import Problem

if TYPE_CHECKING:
    from autoflash.benchmark import Report
    from autoflash.cli.doctor import Diagnosis
    from autoflash.runtime.warmup import Warmed
    from autoflash.tuning.cost import Cost
    from autoflash.tuning.plan import Plan


def planned(
    plans: Sequence[Plan], device: Device, as_json: bool, costs: Sequence[Cost] = ()
) -> None:
    """What `tune` would do."""
    if as_json:
        known = {cost.problem: cost_dict(cost) for cost in costs}
        problems = [{**plan_dict(plan), **known.get(plan.problem, {})} for plan in plans]
        write_json({"device": device.to_dict(), "problems": problems})
        return
    if costs:
        _costs(costs, device)
    rows = [
        (
            plan.problem.name,
            part.template,
            part.size,
            part.feasible,
            part.stored,
            f"{part.compile_s:.1f}",
        )
        for plan in plans
        for part in plan.templates
    ]
    columns = ("shape", "template", ">configs", ">feasible", ">already tried", ">s per compile")
    if rows:
        table(f"Plan for {device.name} ({device.arch})", columns, rows)
    _rejections(plans)
    trials, seconds = sum(p.trials for p in plans), sum(p.seconds for p in plans)
    many = "1 problem" if len(plans) == 1 else f"{len(plans)} problems"
    say(f"{trials} trials for {many}, about {duration(seconds)}.")


def _costs(costs: Iterable[Cost], device: Device) -> None:
    rows = [(c.problem.name, c.calls, us(c.call_us), f"{c.share:.1%}") for c in costs]
    columns = ("shape", ">calls", ">us per call", ">share of time")
    table(f"Where the time goes on {device.name}, by the static model", columns, rows)


def cost_dict(cost: Cost) -> dict[str, Any]:
    """What a problem's calls take, for JSON; the field `problem` is the plan's."""
    return {"calls": cost.calls, "call_us": round(cost.call_us, 3), "share": round(cost.share, 6)}


def _rejections(plans: Iterable[Plan]) -> None:
    """What rejects configs and templates, each reason once with the count over all problems."""
    rejected: Counter[tuple[str, str]] = Counter()
    refused: Counter[tuple[str, str]] = Counter()
    for plan in plans:
        refused.update(plan.refused.items())
        for part in plan.templates:
            for reason, count in part.rejected.items():
                rejected[part.template, reason] += count
    if rejected:
        rows = [(template, n, reason) for (template, reason), n in rejected.most_common()]
        table("Rejected configs", ("template", ">configs", "broken constraint"), rows)
    if refused:
        rows = [(template, n, reason) for (template, reason), n in refused.most_common()]
        table("Templates that do not apply", ("template", ">problems", "needs"), rows)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan for JSON."""
    return {
        "problem": plan.problem.name,
        "trials": plan.trials,
        "already_tried": plan.stored,
        "seconds": round(plan.seconds, 1),
        "templates": [
            {
                "template": part.template,
                "configs": part.size,
                "feasible": part.feasible,
                "rejected": dict(part.rejected.most_common()),
                "already_tried": part.stored,
                "compile_s": part.compile_s,
            }
            for part in plan.templates
        ],
        "refused": dict(plan.refused),
    }


def bench_saved(report: Report, out: Path) -> None:
    """The JSON of what `bench` has measured so far, in a file."""
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(report.to_json(), encoding="utf-8")
        part.replace(out)
    except OSError as error:
        say(report.to_json())  # what was measured is not to be lost
        raise InvalidInput(
            f"--out {out} cannot be written ({error}); the JSON is on stdout."
        ) from None


def benched(report: Report, out: Path | None, as_json: bool) -> None:
    """The table of `bench`, or its JSON; and where it is."""
    if out is not None:
        remark(f"written to {out}")
    if as_json:
        say(report.to_json().rstrip())
        return
    from autoflash import benchmark

    laid = benchmark.table(report)
    table(laid.title, laid.columns, laid.rows)
    for line in report.skipped():
        say(f"not timed: {line}")


def warmed(results: Sequence[Warmed], as_json: bool) -> None:
    """What `warmup` built."""
    if as_json:
        write_json([result.to_dict() for result in results])
        return
    rows = [
        (r.served.problem.name, r.served.rule, kernel(r.served.config), f"{r.elapsed_s:.2f}")
        for r in results
    ]
    table("Ready to serve", ("shape", "rule", "kernel", ">seconds"), rows)


def compiled(
    results: Sequence[tuple[Problem, Config | None]], device: Device, as_json: bool
) -> None:
    """What `warmup` compiled for a device that is not here."""
    if as_json:
        write_json([{"problem": p.name, "config": c.to_dict() if c else None} for p, c in results])
        return
    rows = [(problem.name, kernel(config)) for problem, config in results]
    table(f"Compiled for {device.name} ({device.arch})", ("shape", "kernel"), rows)


def diagnosed(diagnosis: Diagnosis, as_json: bool) -> None:
    """What `doctor` found."""
    if as_json:
        write_json({**dataclasses.asdict(diagnosis), "is_useful": diagnosis.is_useful})
        return
    for finding in diagnosis.findings:
        say(f"{finding.status:8}{finding.what}: {finding.found}")
        if finding.costs:
            say(f"{'':8}  costs: {finding.costs}")
        if finding.next_step:
            say(f"{'':8}  next:  {finding.next_step}")
    say()
    say("This machine can:" if diagnosis.can else "This machine can do nothing for now.")
    for ability in diagnosis.can:
        say(f"  - {ability}")
    say(f"Next: {diagnosis.next_step}")
