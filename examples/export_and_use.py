"""Export what was tuned as a Python package, and use the package without autoflash.

    python examples/export_and_use.py

First the records of an NVIDIA H200 that come with autoflash: a package is written from them, on
any machine, with its kernels as sources, and its table says which kernel serves which shape there.
Here, on the CPU, PyTorch serves, with one warning and the same results: a program that depends on
the package runs anywhere. Then a shape is tuned for this CPU, for some seconds, and exported with
its compiled kernel, which that package runs. Both are used by a Python that cannot import
autoflash. Everything is kept in a temporary folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = "b1s512h8/2d64c-float32"

USER = """
import sys, warnings
import torch
import torch.nn.functional as F
sys.modules["autoflash"] = None  # importing it would be an error
warnings.simplefilter("always")

import {package}

torch.manual_seed(0)
q, k, v = (torch.randn(1, 512, heads, 64) for heads in (8, 2, 2))
out = {package}.flash_attn_func(q, k, v, causal=True)
q, k, v = (x.transpose(1, 2) for x in (q, k, v))
expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
difference = (out.transpose(1, 2) - expected).abs().max()
print(f"  {package}.flash_attn_func: largest difference to PyTorch {{difference:.1e}}")
assert difference < 1e-5
"""


def autoflash(*arguments: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Run a command of autoflash's, and stop if it fails."""
    print(f"\n$ autoflash {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "autoflash", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    print(*lines[:4], *["  ..."] * (len(lines) > 4), sep="\n", flush=True)
    if done.returncode not in allowed:
        raise SystemExit(f"exit code {done.returncode}")


def use(project: Path, package: str) -> None:
    """Run a program that knows the package only."""
    print(f"\n$ PYTHONPATH={project} python -c ...", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(project)}
    program = USER.format(package=package)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def show(project: Path, package: str) -> None:
    """Print what the table of a package says."""
    table = json.loads((project / package / "table.json").read_text(encoding="utf-8"))
    device = table["header"]["device"]
    winners, kernels = table["winners"], table["kernels"]
    print(f"\n{package}: {len(winners)} shapes, {len(kernels)} kernels, for {device['name']}")
    for row in winners[:3]:
        facts = kernels[row["kernel"]]
        print(f"  {row['name']}: {row['latency_us']} us by kernels/{facts['file']}")
    if len(winners) > 3:
        print(f"  and {len(winners) - 3} more")


def main() -> None:
    """Both packages: for a device that is elsewhere, and for the one that is here."""
    with tempfile.TemporaryDirectory(prefix="autoflash-example-") as folder:
        os.environ["AUTOFLASH_CACHE_DIR"] = str(Path(folder, "cache"))
        there, here = Path(folder, "h200"), Path(folder, "cpu")

        autoflash(
            "export", "package", "--device", "nvidia-h200", "--sources",
            "--name", "h200_attention", "--out", str(there),
        )  # fmt: skip
        show(there, "h200_attention")
        use(there, "h200_attention")

        autoflash(
            "tune", "--shape", SHAPE, "--effort", "quick", "--trials", "3", allowed=(0, 3)
        )  # 3: the default was best, which is a result as well
        autoflash(
            "export", "package", "--arch", "cpu", "--shape", SHAPE,
            "--name", "my_attention", "--out", str(here),
        )  # fmt: skip
        show(here, "my_attention")
        use(here, "my_attention")


if __name__ == "__main__":
    main()
