"""Record what a program runs, tune for that, run it again.

    python examples/tune_what_ran.py

The program is this file, started with the argument "program": a few layers of attention over two
lengths, a stand-in for yours. With AUTOFLASH_RECORD=FILE in its environment, autoflash.attention
writes down what it serves; `autoflash tune --problems FILE` tunes that, the most work first; the
next start of the program is served by what was learned. Everything is kept in a temporary folder:
leave out AUTOFLASH_CACHE_DIR to tune for good. The search is short, so that this takes a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTHS = {512: 40, 128: 10}
"""Rows of a sequence -> how many of them the program computes."""


def program() -> None:
    """What you run anyway."""
    import torch

    import autoflash

    torch.manual_seed(0)
    with torch.inference_mode():
        for length, times in LENGTHS.items():
            q, k, v = (torch.randn(1, length, heads, 64) for heads in (8, 2, 2))
            for _ in range(times):
                autoflash.attention(q, k, v, causal=True)
    for length in LENGTHS:
        name = f"b1s{length}h8/2d64c-float32"
        served = autoflash.explain(name)
        print(f"  {name}: rule {served.rule}, {served.reason}")
        print(f"    {served.config.template if served.config else 'PyTorch'} {served.config or ''}")
        if served.record is not None and served.record.latency_us is not None:
            record = served.record
            print(f"    {record.latency_us:.0f} us; its default {record.default_us or 0:.0f} us")


def run(title: str, *command: str, allowed: tuple[int, ...] = (0,), **environment: str) -> None:
    """Run a command of Python's with more in its environment, and stop if it fails."""
    print(f"\n{title}", flush=True)
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, check=False
    )
    if done.returncode not in allowed:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")


def main() -> None:
    """The three steps, each a process of its own."""
    with tempfile.TemporaryDirectory(prefix="autoflash-example-") as folder:
        ran = Path(folder, "ran.txt")
        place = {"AUTOFLASH_CACHE_DIR": str(Path(folder, "cache"))}
        run("1. run it, recorded", __file__, "program", AUTOFLASH_RECORD=str(ran), **place)
        print(f"\nwhat {ran.name} says:\n{ran.read_text()}", end="")
        tune = ["tune", "--problems", str(ran), "--top", "1", "--effort", "quick", "--trials", "6"]
        # Exit code 3: nothing was faster than the default. The record then says that.
        run(f"2. autoflash {' '.join(tune)}", "-m", "autoflash", *tune, allowed=(0, 3), **place)
        run("3. run it again", __file__, "program", **place)


if __name__ == "__main__":
    program() if sys.argv[1:] == ["program"] else main()
