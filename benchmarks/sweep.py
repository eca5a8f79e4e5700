"""Record trial tables: run every feasible config of some problems once, on the device found here.

python benchmarks/sweep.py --grid cpu --seconds 300 --out tests/replay
python benchmarks/sweep.py --problems b4s4096h16d128c --templates 'gluon/*,triton/*' --do-bench 10

One table per problem, one line per config: outcome, what every rung of the race measured and how
long it took, seconds to compile, to load and to check. Compilers work beside the device, as in a
search, and as there a config goes no further in the race once it has lost. Each source is checked
for correctness once, and the first configs of each problem.

It stops when the time is up; run it again with the same arguments and it goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from autoflash import device as devices
from autoflash.benchmark.grids import grid
from autoflash.cli.options import template_names
from autoflash.errors import AutoflashError
from autoflash.problem import Problem
from autoflash.tuning.survey import survey
from autoflash.tuning.table import Row

SILENT_S = 5.0


def main() -> int:
    """Record the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", default="fwd", help="a grid, or a file of problems")
    parser.add_argument("--problems", help="these instead: names, separated by commas")
    parser.add_argument("--templates", action="append", help="globs; default: all")
    parser.add_argument("--sample", type=int, help="random configs per template; default: all")
    parser.add_argument("--seconds", type=float, help="most time")
    parser.add_argument(
        "--do-bench", type=int, default=0, metavar="N",
        help="time every Nth config as triton.autotune does, too (GPU only)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tests/replay"), help="folder")
    options = parser.parse_args()
    began = said = time.monotonic()
    names = options.problems.split(",") if options.problems else None

    def tell(problem: Problem, row: Row, done: int, total: int) -> None:
        nonlocal said
        if done == total or time.monotonic() - said > SILENT_S:
            said = time.monotonic()
            took = f"{said - began:.0f} s"
            print(f"{took}: {problem.name} {done}/{total}: {row.config} {row.outcome}", flush=True)

    try:
        tables = survey(
            [Problem.parse(name) for name in names] if names else grid(options.grid),
            devices.native(),
            options.out,
            templates=template_names(options.templates),
            sample=options.sample,
            seconds=options.seconds,
            do_bench_every=options.do_bench,
            seed=options.seed,
            on_row=tell,
        )
    except AutoflashError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    for table in tables:
        print(f"{table.name}: {len(table.rows)} of {table.feasible} configs")
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
