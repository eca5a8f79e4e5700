"""Print a report of `autoflash bench --out FILE` as a Markdown table, as the README shows them.

python benchmarks/markdown.py benchmarks/nvidia-h200/fwd.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

LEFT_OUT = ("math", "naive", "sdpa")
"""Columns that say nothing about the state of the art, or repeat another one."""


def main(path: Path) -> None:
    """Print the table of one report: TFLOPS per provider, ratio to the best peer."""
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in report["rows"] if row["outcome"] == "ok"]
    shown = [row for row in rows if row["provider"] not in LEFT_OUT or report_is_cpu(report)]
    providers = list(dict.fromkeys(row["provider"] for row in shown))
    print(f"| problem | {' | '.join(providers)} | over the best peer |")
    print(f"|---|{'---:|' * len(providers)}---:|")
    ratios: list[float] = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        cells = {row["provider"]: row for row in shown if row["problem"] == problem}
        best = min(
            (row for name, row in cells.items() if name != "autoflash"),
            key=lambda row: row["latency_us"],
        )
        ratios.append(best["speedup"])
        listed = " | ".join(tflops(cells.get(name)) for name in providers)
        print(f"| {problem} | {listed} | {best['speedup']:.2f}x {best['provider']} |")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(
        f"\nGeometric mean over the best peer of each row: {mean:.2f}x; worst {min(ratios):.2f}x."
    )
    facts = report["environment"]
    known = [name for name in ("torch", "triton", "cudnn", "flash-attn-4") if facts.get(name)]
    versions = ", ".join(f"{name} {facts[name]}" for name in known)
    device, date = report["device"]["name"], report["date"][:10]
    print(f"{device}, {date}, {versions}; policy {report['policy']}.")


def report_is_cpu(report: dict[str, Any]) -> bool:
    """Whether the plain implementations are the only peers there are."""
    return bool(report["device"]["arch"] == "cpu")


def tflops(row: dict[str, Any] | None) -> str:
    """A cell: TFLOPS to three digits."""
    return f"{row['tflops']:.3g}" if row else "-"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
