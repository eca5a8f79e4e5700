"""An exported package on the device it is for, in a process that has no autoflash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import exports, venvs

from autoflash import device as devices
from autoflash.export import Options, package, write

pytestmark = pytest.mark.gpu

SUPPORT = Path(__file__).parents[1] / "support"
WINNERS = (
    "b4s4096h16/16d128c-bfloat16",  # CUDA
    "b16s1024h8/8d256c-bfloat16",  # Gluon
    "b16s1024h32/32d64f-bfloat16",
    "b4s4096h16/16d128c-float8_e4m3fn",
)


def case(q: tuple[int, ...], k: tuple[int, ...], dtype: str, **options: Any) -> dict[str, Any]:
    return {"q": q, "k": k, "v": k, "dtype": dtype, "options": options}


def test_the_winners_of_a_device_serve_where_autoflash_is_not(tmp_path: Path) -> None:
    here = devices.native()
    known = exports.reviewed(*WINNERS)
    if here.arch != known.device.arch:
        pytest.skip(f"the reviewed records are for {known.device.arch}, this is {here.arch}")
    files = package.package_files(known, Options(name="tuned_gpu"))
    write(tmp_path / "export", "package", known, files)
    python = venvs.venv(tmp_path / "venv", venvs.dependencies(tmp_path / "dependencies"))
    cases = [
        case((1, 1024, 4, 128), (1, 1024, 4, 128), "bfloat16", causal=True),
        case((2, 1777, 8, 128), (2, 2333, 2, 128), "bfloat16", causal=True),
        case((1, 1500, 4, 128), (1, 700, 4, 128), "bfloat16", causal=True),  # rows see nothing
        case((2, 1111, 4, 128), (2, 1111, 4, 128), "bfloat16", causal=True, layout="bhsd"),
        case((16, 1024, 8, 256), (16, 1024, 8, 256), "bfloat16", causal=True),
        case((3, 999, 8, 256), (3, 1001, 8, 256), "bfloat16", causal=True),
        case((2, 1500, 8, 256), (2, 700, 8, 256), "bfloat16", causal=True),
        case((2, 1001, 8, 64), (2, 999, 4, 64), "bfloat16"),
        case((1, 1024, 4, 128), (1, 1024, 4, 128), "float8_e4m3fn", causal=True),
        case((2, 900, 8, 128), (2, 1100, 4, 128), "float8_e4m3fn", causal=True),
        # What nothing was tuned for.
        case((1, 300, 4, 80), (1, 300, 4, 80), "float16", causal=True),
    ]
    compiled = {**cases[1], "compiled": True}
    done = subprocess.run(
        [str(python), str(SUPPORT / "exported.py"), "tuned_gpu"],
        input=json.dumps([*cases, compiled]), cwd=tmp_path, capture_output=True, text=True,
        env={**environment(), "PYTHONPATH": str(tmp_path / "export")}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    *served, by_torch, again = found
    for asked, each in zip([*cases, compiled], found, strict=True):
        assert each["error"] <= each["allowed"], (asked, each)
        tolerance = 5e-3 if asked["dtype"].startswith("float8") else 1e-3
        assert each["lse_error"] < tolerance, (asked, each)
    assert {each["rule"] for each in (*served, again)} <= {"exact", "nearest"}
    assert by_torch["rule"] == "torch"
    assert len({each["kernel"] for each in served}) == len(package.kernels(known))


def test_the_benchmark_finds_it_as_fast(tmp_path: Path) -> None:
    here = devices.native()
    if here.key != exports.reviewed().device.key:
        pytest.skip(f"there are no reviewed records of {here.name}")
    out = tmp_path / "speed.json"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "export_package.py"), "--out", str(out),
         "--rounds", "5", "--budget-ms", "20"],
        cwd=root, capture_output=True, text=True, check=False,
        # What autoflash needs may be on the path and not installed.
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
             "AUTOFLASH_CACHE_DIR": os.environ["AUTOFLASH_CACHE_DIR"]},
    )  # fmt: skip
    # How fast, is the benchmark's to judge: 1 says slower, and so does Python of an error.
    assert done.returncode in (0, 1), done.stderr
    assert out.is_file(), done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    assert all(row["package_us"] > 0 and row["low"] <= row["high"] for row in rows)


def environment() -> dict[str, str]:
    """This one's, without variables of autoflash's and of where Python looks."""
    ours = ("AUTOFLASH_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
