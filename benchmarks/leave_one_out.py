"""What does a dispatch table lose on a shape that it was not chosen by? Each is left out in turn.

python benchmarks/leave_one_out.py benchmarks/nvidia-h200/dispatch-tables.jsonl

The file is a dump that holds tables (autoflash db dump): their recorded times, of all shapes. For
each shape a table is chosen anew from the others, and serves it. Prints mean and worst regret.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from autoflash.dispatch_table import STRATEGIES, DispatchTable, Regret
from autoflash.tuning.partition import partition


def main() -> int:
    """Print a line for each table of a dump."""
    if len(sys.argv) != 2:
        print(
            "leave_one_out: give a dump: python benchmarks/leave_one_out.py FILE", file=sys.stderr
        )
        return 2
    lines = map(json.loads, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    print(f"{'family':24}" + "".join(f"{name:>18}" for name in STRATEGIES))
    for table in (DispatchTable.from_dict(line["table"]) for line in lines if "table" in line):
        cells = (regret(table, strategy) for strategy in STRATEGIES)
        print(f"{table.family.name:24}" + "".join(f"{x.mean:9.1%}{x.worst:9.1%}" for x in cells))
    return 0


def regret(table: DispatchTable, strategy: str) -> Regret:
    """Of a strategy, over all shapes of a table, each served by a table of the others."""
    ratios = {}
    for out in table.probes:
        probes = tuple(dataclasses.replace(p, held_out=p is out) for p in table.probes)
        without = dataclasses.replace(table, probes=probes, leaves=partition(probes))
        ratios[out.problem.name] = without.time_us(strategy, out) / out.best_us
    return Regret.of(ratios)


if __name__ == "__main__":
    sys.exit(main())
