"""What are kernels busy with, and what do they wait for? Nsight Compute's counters, in per cent.

    python benchmarks/profile_kernels.py [--problem NAME ...] [--out FILE]

Each problem is served as `autoflash.attention` serves it; the one launch that is looked at comes
after two that warm up. Clocks are left alone, so that shares are those of a real run. Needs `ncu`,
which comes with the CUDA toolkit, and the right to read counters.

Exit code: 0, or 2 when nothing could be measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoflash import device
from autoflash.benchmark.runner import attention_options
from autoflash.errors import AutoflashError, InvalidInput, ToolchainMissing
from autoflash.problem import Problem
from autoflash.tuning.environment import environment
from autoflash.tuning.inputs import make_inputs

PROBLEMS = [
    "b16s1024h32d64c", "b4s4096h32d64c", "b4s4096h32d64f", "b4s4096h16d128c", "b4s4096h16d128f",
    "b4s4096h8d256c", "b4s4096h8d256f",
]  # fmt: skip
SHARES = {
    "tensor cores": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "exponential units": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "FMA units": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "ALUs": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared memory's data path": (
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed"
    ),
    "device memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
"""What is shown -> the counter: per cent of what the unit could do."""
DURATION = "gpu__time_duration.sum"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
MARK = "FillFunctor"
"""In the name of the kernel that ends a problem: that of torch.zeros."""
TIMEOUT_S = 300.0


def main() -> int:
    """Profile, print a table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problem", action="append", help="by name; may be repeated")
    parser.add_argument("--out", type=Path, help="write the counters as JSON")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.problem or PROBLEMS
    try:
        problems = [Problem.parse(name) for name in names]
        if options.run:
            launch(problems)
            return 0
        rows = profile(problems)
    except AutoflashError as error:
        print(f"profile_kernels: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if options.out:
        report = {"environment": environment(device.native()), "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def launch(problems: Sequence[Problem]) -> None:
    """Call attention on each problem, the profiler on for the third call only, and mark its end."""
    import torch

    from autoflash import attention

    for problem in problems:
        inputs = make_inputs(problem, device.native(), seed=0, q_factor=1.0)
        options = attention_options(inputs)
        for turn in range(3):
            torch.cuda.synchronize()
            if turn == 2:
                torch.cuda.profiler.start()
            attention(inputs.q, inputs.k, inputs.v, **options)
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """The counters of each problem's kernel; of the longest, where there are several.

    Raises:
        InvalidInput: there is no GPU here.
        ToolchainMissing: ncu is not here, or may not read the counters.
    """
    ncu = shutil.which("ncu")
    if not device.native().is_cuda:
        raise InvalidInput(f"{device.native().name} has no counters: this needs a GPU.")
    if ncu is None:
        raise ToolchainMissing("ncu is not on PATH; it comes with the CUDA toolkit.")
    names = [part for problem in problems for part in ("--problem", problem.name)]
    path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
    done = subprocess.run(
        [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
            "--profile-from-start", "off", "--section", "WarpStateStats",
            "--metrics", ",".join([DURATION, *SHARES.values()]),
            sys.executable, __file__, "--run", *names,
        ],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    served: list[list[dict[str, str]]] = [[]]
    for kernel in list(csv.DictReader(lines))[1:]:  # the first row holds units
        if MARK in kernel["Kernel Name"]:
            served.append([])
        else:
            served[-1].append(kernel)
    if done.returncode or len(served) != len(problems) + 1:
        output = (done.stdout + done.stderr).strip()[-500:]
        raise ToolchainMissing(f"ncu did not profile all problems: {output}")
    return [
        _row(problem, max(kernels, key=lambda kernel: _number(kernel[DURATION])))
        for problem, kernels in zip(problems, served, strict=False)
    ]


def _row(problem: Problem, kernel: Mapping[str, str]) -> dict[str, Any]:
    stalls = {
        found[1]: _number(value) for name, value in kernel.items() if (found := STALL.search(name))
    }
    waiting = sum(stalls.values()) or 1.0
    longest = sorted(stalls.items(), key=lambda item: -item[1])[:6]
    return {
        "problem": problem.name,
        "kernel": kernel["Kernel Name"].partition("(")[0],
        "duration_us": _number(kernel[DURATION]) / 1e3,
        "shares": {
            what: round(_number(kernel[name]), 1) for what, name in SHARES.items() if name in kernel
        },
        "warps_wait_for": {name: round(100 * value / waiting, 1) for name, value in longest},
    }


def _number(text: str) -> float:
    return float(text.replace(",", "") or 0)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown: a line per unit, a column per problem."""
    lines = ["| busy, % | " + " | ".join(row["problem"] for row in rows) + " |"]
    lines.append("|---|" + "---:|" * len(rows))
    for what in SHARES:
        cells = (str(round(row["shares"].get(what, float("nan")))) for row in rows)
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for row in rows:
        waits = ", ".join(f"{name} {share} %" for name, share in row["warps_wait_for"].items())
        lines.append(f"\n{row['problem']} ({row['kernel']}): warps' time: {waits}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
