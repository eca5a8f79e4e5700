"""Print a report of `autoflash bench --out FILE` as Markdown: a table, standings, conditions.

python benchmarks/markdown.py benchmarks/nvidia-h200/fwd.json [--rows]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from autoflash.benchmark.grids import GRIDS
from autoflash.benchmark.report import OURS, Report, Row
from autoflash.benchmark.standing import Ratio, best_ratios, ratios, rivals, standing
from autoflash.errors import AutoflashError
from autoflash.tuning.telemetry import POWER_AFTER_S

VERSIONS = ("torch", "triton", "cudnn", "flash-attn", "flash-attn-3", "flash-attn-4", "driver")


def main() -> int:
    """Print one report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path, help="what `autoflash bench --out` wrote")
    parser.add_argument("--rows", action="store_true", help="every provider's own row instead")
    options = parser.parse_args()
    try:
        report = Report.load(options.report)
    except AutoflashError as error:
        print(f"markdown: {error}", file=sys.stderr)
        return 2
    print(rows_table(report) if options.rows else whole(report))
    return 0


def whole(report: Report) -> str:
    """Everything the README shows of a report."""
    parts = (table(report), standings(report), conditions(report))
    return "\n\n".join(part for part in parts if part)


def table(report: Report) -> str:
    """One line per problem: TFLOPS of each provider, autoflash over the best peer."""
    peers = rivals(report)
    ours = {row.problem: row for row in report.rows if row.provider == OURS}
    best = best_ratios(report, peers)
    providers = [OURS, *peers]
    heading = ["problem", *(f">{name}" for name in providers)]
    columns = [[row.problem, *_rates(report, row.problem, providers)] for row in ours.values()]
    if peers:
        heading.append(">over the best peer")
        for row, cells in zip(ours.values(), columns, strict=True):
            cells.append(times(best.get(row.problem)))
    if len(_served(report)) > 1:
        heading += ["kernel", "rule"]
        for row, cells in zip(ours.values(), columns, strict=True):
            cells += [f"`{row.template}`" if row.template else "PyTorch", row.rule or ""]
    if any(row.clock_mhz for row in ours.values()):
        heading.append(_state_heading(report))
        for row, cells in zip(ours.values(), columns, strict=True):
            cells.append(_state(report, row))
    return markdown(heading, columns)


def standings(report: Report) -> str:
    """Geometric mean and worst problem, against the best peer of each and against each peer."""
    peers = rivals(report)
    against = {"the best peer of each row": list(best_ratios(report, peers).values())}
    against |= {peer: ratios(report, peer) for peer in peers} if len(peers) > 1 else {}
    lines = []
    for name, found in against.items():
        if found:
            one = standing(found)
            worst = f"{times(one.worst, name=len(peers) > 1 and name not in peers)}"
            lines.append([name, str(one.count), f"{one.mean:.2f}x", worst, one.worst.problem])
    heading = [f"{OURS} over", ">problems", ">geometric mean", ">worst", "where"]
    return markdown(heading, lines) if lines else ""


def conditions(report: Report) -> str:
    """Command, device, date, versions, what an interval is, and what served."""
    facts = report.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in VERSIONS if facts.get(name))
    said = [f"`{command(report)}`.", f"{report.device.name}, {report.date[:10]}, {versions}."]
    said.append(f"Policy {report.policy}.")
    served = _served(report)
    if len(served) == 1:
        ((template, rule),) = served
        said.append(f"All served by {f'`{template}`' if template else 'PyTorch'}, rule {rule}.")
    if any(row.speedup_low for row in report.rows):
        said.append("Ratios are medians of paired rounds, in brackets their 90 % intervals.")
    if any(row.clock_mhz for row in report.rows):
        what = _state_heading(report).removeprefix(">").capitalize()
        said.append(f"{what}: medians while {OURS} had its turns.")
    return " ".join(said)


def command(report: Report) -> str:
    """What to type to measure this again."""
    problems = tuple(dict.fromkeys(row.problem for row in report.rows))
    grids = [name for name, grid in GRIDS.items() if tuple(p.name for p in grid) == problems]
    which = f"--grid {grids[0]}" if grids else "--problems FILE"
    providers = dict.fromkeys(row.provider for row in report.rows)
    settings = report.settings
    return (
        f"autoflash bench {which} --rounds {settings['rounds']}"
        f" --budget-ms {settings['budget_ms']:g} --providers {','.join(providers)}"
    )


def rows_table(report: Report) -> str:
    """Every provider's row: time, spread, state of the board, error."""
    heading = ["problem", "provider", ">us", ">p20 to p80", ">TFLOPS"]
    heading += [_state_heading(report), "outcome"]
    lines = [
        [
            row.problem,
            row.provider,
            f"{row.latency_us:.1f}" if row.latency_us else "-",
            f"{row.p20_us:.1f} to {row.p80_us:.1f}" if row.p20_us and row.p80_us else "",
            rate(row.tflops),
            _state(report, row),
            row.outcome if row.outcome == "ok" else f"{row.outcome}: {row.reason}",
        ]
        for row in report.rows
    ]
    return markdown(heading, lines)


def markdown(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; a heading that starts with ">" is aligned right."""
    rule = "|".join("---:" if name.startswith(">") else "---" for name in heading)
    titles = " | ".join(name.removeprefix(">") for name in heading)
    body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join((f"| {titles} |", f"|{rule}|", *body))


def rate(tflops: float | None) -> str:
    """TFLOPS to three digits."""
    return "-" if tflops is None else f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}"


def times(one: Ratio | None, *, name: bool = True) -> str:
    """A ratio with its interval, such as "0.97x cudnn [0.96, 0.98]"."""
    if one is None:
        return ""
    peer = f" {one.peer}" if name else ""
    interval = f" [{one.low:.2f}, {one.high:.2f}]" if one.low and one.high else ""
    return f"{one.ratio:.2f}x{peer}{interval}"


def _rates(report: Report, problem: str, providers: Iterable[str]) -> list[str]:
    found = {row.provider: row.tflops for row in report.rows if row.problem == problem}
    return [rate(found.get(provider)) for provider in providers]


def _served(report: Report) -> set[tuple[str | None, str | None]]:
    """What served autoflash's rows: template and rule."""
    ours = (row for row in report.rows if row.provider == OURS and row.latency_us is not None)
    return {(row.template, row.rule) for row in ours}


def _has_own_power(report: Report) -> bool:
    """Whether turns were so long that the board's power was that of one provider."""
    turn_ms = float(report.settings["budget_ms"] / report.settings["rounds"])
    return turn_ms > 1000 * POWER_AFTER_S


def _state_heading(report: Report) -> str:
    return ">clock, power" if _has_own_power(report) else ">clock"


def _state(report: Report, row: Row) -> str:
    power_w = row.power_w if _has_own_power(report) else None
    parts = ((row.clock_mhz, "MHz"), (power_w, "W"))
    return ", ".join(f"{value:.0f} {unit}" for value, unit in parts if value is not None)


if __name__ == "__main__":
    sys.exit(main())
