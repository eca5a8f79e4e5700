"""Is an exported package as fast as autoflash.attention?

Exports the winners of some problems as `autoflash export package` does, loads the package, and
times its flash_attn_func beside autoflash.attention in the same rounds; and the Python of both, on
the host, over many calls.

    python benchmarks/export_package.py [--problems NAME,NAME...] [--rounds N] [--out FILE]

Exit code: 0 as fast within the noise, 1 slower, 2 where it cannot be measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import autoflash
from autoflash import device as devices
from autoflash.codegen import catalog
from autoflash.database import Database
from autoflash.device import Device
from autoflash.errors import AutoflashError, InvalidInput
from autoflash.export import Options, Selection, package, select, write
from autoflash.problem import Problem
from autoflash.tuning.environment import environment
from autoflash.tuning.inputs import make_inputs
from autoflash.tuning.timing import MARGIN, Timer

DEFAULT = (
    "b4s4096h16/16d128c-bfloat16,b16s1024h8/8d256c-bfloat16,b16s1024h32/32d64c-bfloat16,"
    "b4s4096h16/16d128c-float8_e4m3fn"
)
NAME = "autoflash_exported_for_timing"
CALLS = 200  # of one block: a stream takes about 1000 launches before the host has to wait
BLOCKS = 7


def main() -> int:
    """Export, measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", default=DEFAULT, help="tuned on this device, by name")
    parser.add_argument("--arch", default="native", help="as of `tune`; cpu to try this out")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--budget-ms", type=float, default=200.0, help="of each, over all rounds")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    device = devices.for_arch(options.arch)
    try:
        selection = chosen(device, options.problems.split(","))
        with tempfile.TemporaryDirectory() as folder:
            exported = load(selection, Path(folder))
            timer = Timer(device)
            rows = [
                measure(entry.problem, device, exported, timer, options.rounds, options.budget_ms)
                for entry in selection.entries
            ]
    except AutoflashError as error:
        print(f"export_package: {error}", file=sys.stderr)
        return 2
    print(f"{'problem':36} {'autoflash us':>12} {'package us':>10} {'ratio':>21} {'host us':>14}")
    for row in rows:
        print(
            f"{row['problem']:36} {row['autoflash_us']:12.1f} {row['package_us']:10.1f} "
            f"{row['ratio']:7.3f} [{row['low']:.3f}, {row['high']:.3f}] "
            f"{told(row['autoflash_host_us'])} {told(row['package_host_us'])}"
        )
    if options.out is not None:
        result = {"device": device.to_dict(), "environment": environment(device), "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["low"] > 1 + MARGIN for row in rows) else 0


def told(host_us: float | None) -> str:
    """A time of the host in its column."""
    return f"{'-' if host_us is None else format(host_us, '.1f'):>6}"


def chosen(device: Device, names: list[str]) -> Selection:
    """The winners of these problems on this device."""
    wanted = {Problem.parse(name) for name in names}
    with Database.open() as database:
        found = select(
            database, catalog.installed(), templates="*", device_key=device.key,
            choose=lambda records: [record for record in records if record.problem in wanted],
        )  # fmt: skip
    missing = wanted - {entry.problem for entry in found.entries}
    if missing:
        names = sorted(problem.name for problem in missing)
        raise InvalidInput(f"not tuned on {device.name}: {', '.join(names)}. Choose --problems.")
    return found


def load(selection: Selection, folder: Path) -> types.ModuleType:
    """The package of a selection, written and imported."""
    progress = partial(print, file=sys.stderr)
    files = package.package_files(selection, Options(name=NAME, progress=progress))
    write(folder, "package", selection, files)
    sys.path.insert(0, str(folder))
    return importlib.import_module(NAME)


def measure(
    problem: Problem,
    device: Device,
    exported: types.ModuleType,
    timer: Timer,
    rounds: int,
    budget_ms: float,
) -> dict[str, Any]:
    """Both on one problem: medians, their ratio with its interval, and the host's time of a call.

    Args:
        problem: tuned and exported.
        device: present.
        exported: the package.
        timer: of the device.
        rounds: turns of each.
        budget_ms: of each, over all rounds.
    """
    inputs = make_inputs(problem, device)
    given = (inputs.q, inputs.k, inputs.v)
    names = ("q_descale", "k_descale", "v_descale")
    scaled = dict(zip(names, inputs.descales, strict=False))
    calls: dict[str, Callable[[], object]] = {
        "autoflash": partial(autoflash.attention, *given, causal=problem.causal, **scaled),
        "package": partial(exported.flash_attn_func, *given, causal=problem.causal, **scaled),
    }
    expected, found = calls["autoflash"](), calls["package"]()
    assert isinstance(expected, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected)
    timed = timer.interleave(calls, rounds=rounds, budget_ms=budget_ms)
    ratio = timed.compare("package", "autoflash")
    return {
        "problem": problem.name,
        **{f"{name}_us": timed[name].latency_us for name in calls},
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        **{f"{name}_host_us": host_us(call, device) for name, call in calls.items()},
    }


def host_us(call: Callable[[], object], device: Device) -> float | None:
    """Microseconds of Python that a call takes, the device being behind; on a CPU there is none."""
    if not device.is_cuda:
        return None
    blocks = []
    for _ in range(BLOCKS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        blocks.append((time.perf_counter() - began) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(blocks)


if __name__ == "__main__":
    sys.exit(main())
