"""How soon does the search find what an exhaustive sweep finds? From recorded tables, or for real.

python benchmarks/sweep.py --templates 'gluon/*,triton/*' --do-bench 10 --out tests/replay
python benchmarks/search_speed.py tests/replay benchmarks/nvidia-h200/sweeps --out speed.json
python benchmarks/search_speed.py tests/replay --real b4s4096h16d128c,b4s4096h32d64f --out ...

Measured, once per config, on the device that the tables name: seconds to compile, to load, to check
and of each rung of the race, and the latency; for every Nth config, the seconds that
triton.testing.do_bench takes with the arguments of triton.autotune.

Computed from these: the wall time of the exhaustive sweep, which compiles with as many processes as
the search (`sweep_s`), or one kernel after the other as triton.autotune does (`serial_sweep_s`),
then times each kernel by do_bench and checks none. Configs that were not timed by do_bench count
with the median of those that were. Compiling takes longer while others compile: with --alone N, N
kernels are compiled again with nothing beside them, and the seconds of the serial sweep's
compilations are scaled by what that took.

Replayed, five seeds: autoflash's search and plain Optuna TPE without racing, through the tuner's
own loop on a simulated clock, each problem alone and with nothing compiled before. What the search
itself computes takes no simulated time.

With --real, run for real beside them, on the device found here, in a new cache: `autoflash tune` of
those problems; the seconds until the best so far is a config within 1 % of the table's best, by the
times in the table.

The result is a JSON file, and with matplotlib a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoflash import device as devices
from autoflash import settings
from autoflash.build import cache
from autoflash.codegen import catalog
from autoflash.errors import AutoflashError, InvalidInput
from autoflash.problem import Problem
from autoflash.tuning.pool import Pool
from autoflash.tuning.replay import replay
from autoflash.tuning.simulate import NEAR, Spread, serial_sweep_s, sweep_s
from autoflash.tuning.strategy import SHIPPED, STRATEGIES
from autoflash.tuning.table import Table, read_all
from autoflash.tuning.trials import compile_request

COMPARED = (SHIPPED.name, "tpe")
GOAL = 0.2
"""Of the sweep's wall time; in that the search is to arrive."""


def main() -> int:
    """Write the report and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", type=Path, nargs="+", help="tables, or folders of them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--real", help="problems to search for real, too, separated by commas")
    parser.add_argument("--alone", type=int, default=0, metavar="N", help="compile N alone, too")
    parser.add_argument("--seconds", type=float, default=60.0, help="most time of each real search")
    parser.add_argument("--out", type=Path, required=True, help="a .json; the .png goes beside it")
    options = parser.parse_args()
    try:
        tables = read_all(options.tables)
        names = {table.header.device.name for table in tables}
        if len(names) > 1:
            raise InvalidInput(f"tables of several devices ({', '.join(sorted(names))}): give one.")
        problems = options.real.split(",") if options.real else []
        wanted = [_of(tables, Problem.parse(name)) for name in problems]
        alone = compile_alone(tables, options.alone) if options.alone else None
        report = compared(tables, options.seeds, alone)
        if wanted:
            report["real"] = [real(table, options.seconds, alone) for table in wanted]
    except AutoflashError as error:
        print(f"search_speed: {error}", file=sys.stderr)
        return 2
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(summary(report))
    draw(report, options.out.with_suffix(".png"))
    return 0


def compile_alone(tables: Sequence[Table], count: int) -> float:
    """Seconds to compile kernels with nothing beside them, over those recorded; of `count` kernels.

    They are taken at equal distances from all rows, and compiled in a new cache.
    """
    rows = [
        (table, row)
        for table in tables
        for row in table.rows.values()
        if row.compile_s and row.rungs
    ]
    chosen = rows[:: max(1, len(rows) // count)][:count]
    known = catalog.installed()
    recorded_s = taken_s = 0.0
    with _new_cache():
        workers = Pool(jobs=1, cache_dir=cache.root(), visible="")
        try:
            for table, row in chosen:
                header = table.header
                template = known.get(row.config.template)
                source = template.render(row.config, header.problem, header.device)
                request = compile_request(source, header.device)
                workers.submit("compile", source.digest, request, 300.0)
                (finished,) = workers.wait(600.0)
                if finished.reply["outcome"] == "ok":
                    taken_s += finished.reply["resources"]["compile_s"]
                    recorded_s += row.compile_s or 0.0
        finally:
            workers.close()
    if not recorded_s:
        raise InvalidInput(
            "no kernel of these tables could be compiled alone: no seconds were recorded, or the "
            "templates have changed since. Leave out --alone, or record the tables again."
        )
    return taken_s / recorded_s


@contextmanager
def _new_cache() -> Iterator[Path]:
    """An empty cache directory: what was compiled for the tables would look fast."""
    before = os.environ.get("AUTOFLASH_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="autoflash-speed-") as folder:
        os.environ["AUTOFLASH_CACHE_DIR"] = folder
        settings.get.cache_clear()
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["AUTOFLASH_CACHE_DIR"]
            else:
                os.environ["AUTOFLASH_CACHE_DIR"] = before
            settings.get.cache_clear()


def compared(tables: Sequence[Table], seeds: int, alone: float | None = None) -> dict[str, Any]:
    """The sweep of every table, and the searches by each of COMPARED.

    Args:
        tables: of one device.
        seeds: how many.
        alone: seconds of a compilation with nothing beside it, over those recorded; None: unknown.
    """
    header = tables[0].header
    rows = []
    for table in tables:
        pool_s, serial_s = sweep_s(table), serial_sweep_s(table, alone or 1.0)
        searches = {}
        for name in COMPARED:
            traces = [t for seed in range(seeds) for t in replay([table], name, seed=seed)]
            seconds = [trace.reached(NEAR)[1] for trace in traces]
            searches[name] = {
                "trials": [_plain(trace.reached(NEAR)[0]) for trace in traces],
                "seconds": [_plain(value) for value in seconds],
                "share": _spread([value / pool_s for value in seconds]),
                "share_of_serial": _spread([value / serial_s for value in seconds]),
            }
        rows.append(
            {
                "problem": table.name,
                "configs": len(table.rows),
                "feasible": table.feasible,
                "sample": table.header.sample,
                "best_us": table.best.latency_us,
                "best": {"template": table.best.config.template, **table.best.config},
                "sweep_s": pool_s,
                "serial_sweep_s": serial_s,
                "searches": searches,
            }
        )
    return {
        "schema_version": 1,
        "device": header.device.name,
        "date": header.date,
        "policy": header.policy,
        "environment": dict(header.environment),
        "jobs": header.jobs,
        "seeds": seeds,
        "near": NEAR,
        "compile_alone": alone,
        "strategies": {name: STRATEGIES[name].summary for name in COMPARED},
        "rows": rows,
        "overall": {
            name: {
                kind: _overall([row["searches"][name][kind] for row in rows])
                for kind in ("share", "share_of_serial")
            }
            for name in COMPARED
        },
    }


def real(table: Table, seconds: float, alone: float | None = None) -> dict[str, Any]:
    """One search of a table's problem on the device found here, in a new cache."""
    from autoflash.database import Database
    from autoflash.tuning import tuner

    device = devices.native()
    if device.key != table.header.device.key:
        raise InvalidInput(
            f"{table.name} was recorded on {table.header.device.name}; here is {device.name}."
        )
    began, curve = math.inf, []
    limit_us = (1 + NEAR) * (table.best.latency_us or 0.0)
    best: tuple[float, float] = (math.inf, math.inf)  # as measured now, and by the table

    def watch(event: tuner.Event) -> None:
        nonlocal began, best
        now = time.monotonic()
        if event.kind == "start":
            began = now
        record = event.record
        if event.kind == "trial" and record is not None and record.is_measured:
            row = table.rows.get(record.config)
            known = row.latency_us if row is not None else None
            if record.latency_us is not None and record.latency_us < best[0]:
                best = (record.latency_us, known or math.inf)
                curve.append([now - began, record.latency_us, known])

    with _new_cache() as folder, Database.open(f"sqlite:///{folder}/trials.db") as database:
        (result,) = tuner.tune(
            [table.header.problem], device, database=database, max_seconds=seconds,
            templates=list(table.header.spaces), on_event=watch,
        )  # fmt: skip
    reached = next((at for at, _, known in curve if known and known <= limit_us), math.inf)
    simulated = [t.reached(NEAR)[1] for s in range(5) for t in replay([table], seed=s)]
    return {
        "problem": table.name,
        "status": result.status,
        "trials": result.trials,
        "seconds_to_near": _plain(reached),
        "simulated_seconds_to_near": _spread(simulated),
        "share": _plain(reached / sweep_s(table)),
        "share_of_serial": _plain(reached / serial_sweep_s(table, alone or 1.0)),
        "curve": curve,
    }


def summary(report: dict[str, Any]) -> str:
    """A Markdown table: median and worst time until within 1 % of the sweep's best.

    Shares are of the wall time of the sweep as triton.autotune does it.
    """
    lines = [
        "| problem | configs | one by one | in parallel | autoflash | share | plain TPE | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        cells = [row["problem"], str(row["configs"])]
        cells += [f"{row[name]:.0f} s" for name in ("serial_sweep_s", "sweep_s")]
        for name in COMPARED:
            found = row["searches"][name]
            seconds = [value if value is not None else math.inf for value in found["seconds"]]
            spread = Spread.of(seconds)
            cells.append(f"{_text(spread.median, ' s')}, {_text(spread.worst, ' s')}")
            share = found["share_of_serial"]
            cells.append(f"{_percent(share['median'])}, {_percent(share['worst'])}")
        lines.append(f"| {' | '.join(cells)} |")
    overall = [
        f"{name}: median {_percent(found[kind]['median'])}, worst {_percent(found[kind]['worst'])} "
        f"of the sweep {what}"
        for name, found in report["overall"].items()
        for kind, what in (("share_of_serial", "one by one"), ("share", "in parallel"))
    ]
    return "\n".join([*lines, "", *overall])


def draw(report: dict[str, Any], out: Path) -> None:
    """The shares of all problems, with the goal as a line."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("matplotlib is not installed (pip install '.[bench]'): no picture.", file=sys.stderr)
        return
    rows = report["rows"]
    figure = Figure(figsize=(9, 0.28 * len(rows) + 1.6), dpi=150)
    axes = figure.subplots()
    looks = {COMPARED[0]: ("autoflash", "#D55E00"), "tpe": ("Optuna TPE, no racing", "#0072B2")}
    for offset, name in zip((-0.15, 0.15), COMPARED, strict=True):
        label, colour = looks[name]
        for number, row in enumerate(rows):
            shares = row["searches"][name]["share_of_serial"]
            low = shares["median"]
            high = shares["worst"] if shares["worst"] is not None else 2.0
            place = number + offset
            if low is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=1)
                axes.plot([low], [place], "o", color=colour, label=label if not number else None)
            axes.plot([high], [place], "|", color=colour)
    axes.axvline(GOAL, color="#777777", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["problem"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(
        "wall time until within 1 % of the sweep's best, over that of the sweep as\n"
        "triton.autotune does it (dot: median of seeds, bar: worst, at 2: never; dotted: a fifth)"
    )
    axes.legend(fontsize=8)
    figure.suptitle(f"{report['device']}, {report['date'][:10]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out)


def _of(tables: Sequence[Table], problem: Problem) -> Table:
    for table in tables:
        if table.header.problem == problem:
            return table
    raise InvalidInput(
        f"there is no table of {problem.name} among {', '.join(table.name for table in tables)}."
    )


def _overall(spreads: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Median of the medians, worst of the worst."""
    medians = [_number(spread["median"]) for spread in spreads]
    worst = [_number(spread["worst"]) for spread in spreads]
    return {"median": _plain(Spread.of(medians).median), "worst": _plain(max(worst))}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    spread = Spread.of(values)
    return {"median": _plain(spread.median), "worst": _plain(spread.worst)}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _percent(value: float | None) -> str:
    return "never" if value is None else f"{100 * value:.1f} %"


def _text(value: float, unit: str) -> str:
    return f"{value:.0f}{unit}" if math.isfinite(value) else "never"


if __name__ == "__main__":
    sys.exit(main())
