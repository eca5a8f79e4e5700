"""Do the examples run, as a reader would start them, and print what they are there to show?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
DIFFERENCE = r"largest difference to PyTorch (\S+)"


def run(name: str, folder: Path, *arguments: str) -> tuple[str, str]:
    """What an example prints, and its warnings; its folder and that of the caller are its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTOFLASH_")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env={**environment, "AUTOFLASH_CACHE_DIR": str(folder / "cache")},
        cwd=folder, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert names
    assert [name for name in names if f'run("{name}"' not in here] == []


def test_a_tiny_gpt_goes_on_with_a_text(tmp_path: Path) -> None:
    said, _ = run("tiny_gpt.py", tmp_path, "dispatch dispa", "--bytes", "20")
    assert "autoflash: tch dispatch dispatc\n" in said
    assert "PyTorch:   tch dispatch dispatc\n" in said
    assert "was served by cpp/fwd" in said
    (difference,) = re.findall(r"largest difference of a score: (\S+)", said)
    assert float(difference) < 1e-4


def test_what_ran_is_tuned_and_then_serves(tmp_path: Path) -> None:
    said, _ = run("tune_what_ran.py", tmp_path)
    first, recorded, second = re.split(r"what ran.txt says|3\. run it again", said)
    assert first.count("rule default") == 2
    assert "b1s512h8/2d64c-float32 40\nb1s128h8/2d64c-float32 10\n" in recorded
    assert "Tuned on " in recorded
    assert "b1s512h8/2d64c-float32: rule exact" in second
    assert "b1s128h8/2d64c-float32: rule bucket" in second


def test_an_export_serves_without_autoflash(tmp_path: Path) -> None:
    said, warned = run("export_and_use.py", tmp_path)
    there, here = said.split("$ autoflash tune")
    assert re.search(r"h200_attention: \d+ shapes, \d+ kernels, for NVIDIA H200\n", there)
    assert re.search(r"  b\S+: [\d.]+ us by kernels/cuda_fwd_sm90_\w+\.cu\n", there)
    assert re.search(r"my_attention: 1 shapes, 1 kernels, for ", here)
    for part in (there, here):
        (difference,) = re.findall(DIFFERENCE, part)
        assert float(difference) < 1e-5
    # Of another device it says so, once; of this one it has the kernel.
    assert warned.count("PyTorch serves attention") == 1
    assert "not h200_attention: the kernels are for NVIDIA H200 (sm90), not for cpu" in warned
