"""Does compute-sanitizer find anything: accesses out of bounds, races in shared memory?

One config per branch of the declarations, at sizes that fit no tile: a kernel runs some hundred
times slower under it.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launch import Job, source_of

from autoflash import build, device

pytestmark = pytest.mark.gpu

FP8 = "-float8_e4m3fn"
PARTS = {"split_kv": True, "schedule": "tiles", "head_order": "rows"}
JOBS: list[Job] = [
    # Causal with several tiles a block, tiles drawn; without a mask, dealt.
    ("cuda/fwd_sm90", "b1s700h24/12d128c", {}),
    ("cuda/fwd_sm90", "b2s300x333h2d64f-float16", {}),
    ("cuda/fwd_sm90", "b1s300x333h2d64f", {"p_source": "shared", "block_n": 192}),
    ("cuda/fwd_sm90", "b1s300x333h2d128f", {"cluster": 2, "block_n": 176}),
    ("cuda/fwd_sm90", "b1s300x333h2d256c", {}),
    ("cuda/fwd_sm90", "b1s9x333h8/2d128f", {}),
    ("cuda/fwd_sm90", "b1s300x333h4/2d64fw60x20cap30", {}),
    ("cuda/fwd_sm90", "b1s300x333h2d80x48c-float16", {"overlap": False, "pingpong": "issued"}),
    ("cuda/fwd_sm90", "b1s100x1500h2d128c", PARTS),
    ("cuda/fwd_sm80", "b1s300x333h4/2d64c", {}),
    ("cuda/fwd_sm80", "b1s300x333h2d128f", {"num_warps": 8}),
    ("cuda/fwd_sm80", "b1s9x333h8/2d128cw50cap20-float16", {}),
    ("cuda/fwd_fp8_sm90", f"b1s700h24/12d128c{FP8}", {}),
    ("cuda/fwd_fp8_sm90", f"b1s300x333h2d256f{FP8}", {}),
    ("cuda/fwd_fp8_sm90", f"b1s300x333h4/2d64fw60x20cap30{FP8}", {}),
    ("gluon/fwd_sm90", "b1s700h4/2d128c", {}),
    ("gluon/fwd_sm90", "b1s300x333h2d64f-float16", {}),
    ("gluon/fwd_sm90", "b1s300x333h2d256f", {}),
    ("triton/fwd", "b1s300x333h2d128c", {}),
    ("triton/fwd", "b1s5x2000h8/2d64f", {}),
]  # fmt: skip
CLEAN = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed",
}


@pytest.fixture(scope="module")
def sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).is_file():
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not installed")
    return found


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    """Those that this device can run, compiled side by side."""
    here = device.native()
    able = [job for job in JOBS if here.capability == 90 or "sm90" not in job[0]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: build.compile_source(source_of(job), here), able))
    return able


@pytest.mark.parametrize("template", sorted({job[0] for job in JOBS}))
@pytest.mark.parametrize("tool", CLEAN)
def test_nothing_is_found(tool: str, template: str, sanitizer: str, jobs: list[Job]) -> None:
    if tool == "racecheck" and template.startswith("gluon/"):
        # With Triton 3.6 each kernel has one report: a byte read (LDS.U8) where warps wait for work
        # and written (STS.64) where Triton hands it out, with a barrier of all of them between.
        pytest.skip("racecheck reports how Triton hands work to warps, whatever the kernel does")
    mine = [job for job in jobs if job[0] == template]
    if not mine:
        pytest.skip(f"{template} does not run on {device.native().arch}")
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sanitizer, "--tool", tool, sys.executable, "-m", "support.launch"],
        input=json.dumps(mine),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count("ran ") == len(mine), done.stdout[-3000:] + done.stderr[-3000:]
    assert CLEAN[tool] in done.stdout, done.stdout[-5000:]
