"""Records tests/honesty/noise-cpu.json: one call under nine names, timed as in the finals.

`PYTHONPATH=. python tests/honesty/record_noise.py`, about a minute on two cores.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from autoflash import device
from autoflash.tuning.environment import environment
from autoflash.tuning.timing import Timer

NAMES, ROUNDS, SESSIONS = 9, 15, 24


def main() -> None:
    cpu = device.for_arch("cpu")
    a = torch.randn(192, 192)
    sessions = []
    for seed in range(SESSIONS):
        calls = {str(name): partial(torch.matmul, a, a) for name in range(NAMES)}
        timed = Timer(cpu, seed=seed).interleave(calls, rounds=ROUNDS, budget_ms=45.0)
        sessions.append([[float(f"{t:.4g}") for t in timed.rounds[name]] for name in calls])
    facts = {key: environment(cpu)[key] for key in ("device", "torch", "threads")}
    text = json.dumps({"what": "medians of rounds in us", **facts, "sessions": sessions})
    path = Path(__file__).parent / "noise-cpu.json"
    path.write_text(text.replace("]], [[", "]],\n[[") + "\n")


if __name__ == "__main__":
    main()
