"""How many trials per second do several devices of one host make together, beside one alone?

    python benchmarks/devices_speed.py [--devices all] [--seconds 75] [--out FILE]

Tunes twice from nothing: on the first device alone, then on all of them, with as much time, as many
compile processes, and an empty cache and database each. Every device gets two problems, d128 and
d64, and no two problems share sources: what the devices must share is the host. Trials are counted
from the start of the first problem to the end of the last; compiling and finals are in that time,
the start of the devices' processes is not.

Exit code: 0 at least 3/4 of perfect, 1 less, 2 where it cannot be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoflash import settings
from autoflash.cli.options import template_names
from autoflash.database import Database
from autoflash.errors import AutoflashError, InvalidInput
from autoflash.problem import Problem
from autoflash.tuning.boards import Board, choose
from autoflash.tuning.tuner import Event, tune

SHARE = 0.75
"""Of perfect: four devices are to make three times the trials of one."""
RUN_BY_THE_DEVICE = ("ok", "slow", "wrong_result", "runtime_error", "timeout", "crash")
"""Outcomes of trials that got past the compiler, nearly all of them."""
TRAITS = [f"{mask}-{dtype}" for mask in "cf" for dtype in ("bfloat16", "float16")]
SHAPES = ("b4s2048h16d128", "b4s2048h32d64")


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", default="all", help="as of `tune` (default: %(default)s)")
    parser.add_argument("--arch", default="native", help="as of `tune`; cpu to try this out")
    parser.add_argument("--seconds", type=float, default=75.0, help="of each of the two runs")
    parser.add_argument("--templates", default="triton/*,gluon/*", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    try:
        boards = choose(options.devices, options.arch)
        if not 2 <= len(boards) <= len(TRAITS):
            raise InvalidInput(
                f"{len(boards)} devices: this compares one with 2 to {len(TRAITS)}; choose them "
                "with --devices."
            )
        result = measure(boards, options.seconds, template_names([options.templates]))
    except AutoflashError as error:
        print(f"devices_speed: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if result["speedup"] >= SHARE * len(boards) else 1


def measure(boards: Sequence[Board], seconds: float, templates: list[str] | None) -> dict[str, Any]:
    """Both runs, and what came of them."""
    one, several = (run(boards[:count], seconds, templates) for count in (1, len(boards)))
    return {
        "device": boards[0].device.name,
        "cores": len(os.sched_getaffinity(0)),
        "jobs": settings.get().jobs,
        "templates": templates,
        "runs": [one, several],
        "speedup": round(several["trials_per_s"] / one["trials_per_s"], 2),
        "speedup_of_those_run": round(several["run_per_s"] / one["run_per_s"], 2),
        "wanted": SHARE * len(boards),
    }


def run(boards: Sequence[Board], seconds: float, templates: list[str] | None) -> dict[str, Any]:
    """Tune two problems on each device, and count."""
    problems = [
        Problem.parse(shape + traits) for shape in SHAPES for traits in TRAITS[: len(boards)]
    ]
    counted: Counter[str] = Counter()
    by_device: Counter[str] = Counter()
    environment: dict[str, Any] = {}
    times: list[float] = []
    lost: list[str] = []

    def note(event: Event) -> None:
        times.append(time.monotonic())
        if event.kind == "trial" and event.record is not None:
            counted[event.record.outcome] += 1
            by_device[event.device or boards[0].label] += 1
            environment.update(event.record.environment)
        elif event.kind == "lost":
            lost.append(event.message)
        elif event.kind == "done":
            print(f"{event.problem.name}: {event.done} trials, {event.message}", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="autoflash-speed-") as cache:
        os.environ["AUTOFLASH_CACHE_DIR"] = cache
        settings.get.cache_clear()
        with Database.open("sqlite:///" + str(Path(cache, "tuning.db"))) as database:
            results = tune(
                problems,
                boards[0].device,
                database=database,
                max_trials=1000,
                max_seconds=seconds,
                templates=templates,
                on_event=note,
                boards=boards,
                command="devices_speed",
            )
    took_s = times[-1] - times[0]
    ran = sum(counted[outcome] for outcome in RUN_BY_THE_DEVICE)
    return {
        "devices": len(boards),
        "seconds": round(took_s, 1),
        "trials": sum(counted.values()),
        "trials_per_s": round(sum(counted.values()) / took_s, 3),
        "run_per_s": round(ran / took_s, 3),
        "trials_of_each_device": dict(sorted(by_device.items())),
        "outcomes": dict(sorted(counted.items())),
        "statuses": dict(Counter(result.status for result in results)),
        "problems": [problem.name for problem in problems],
        "lost": lost,
        "environment": {k: v for k, v in environment.items() if k != "board"},
    }


if __name__ == "__main__":
    sys.exit(main())
