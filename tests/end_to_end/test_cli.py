"""The commands for real, in processes of their own, on the CPU: tune, look, compare, interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SHAPE = "b1s192h2d32c-float32"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "AUTOFLASH_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


def run(
    environment: dict[str, str], *arguments: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "autoflash", *arguments], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def tuned(environment: dict[str, str]) -> dict[str, object]:
    """What tuning one small problem came to."""
    done = subprocess.run(
        [sys.executable, "-m", "autoflash", "tune", "--arch", "cpu", "--shape", SHAPE,
         "--effort", "normal", "--trials", "3", "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Whether three tries beat the default is for the machine to say: 0 and 3 are both right.
    assert done.returncode in (0, 3), done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert result["status"] == {0: "improved", 3: "unimproved"}[done.returncode]
    return dict(result)


def test_tuning_checks_times_and_stores(
    environment: dict[str, str], tuned: dict[str, object]
) -> None:
    [best] = json.loads(run(environment, "show", "--arch", "cpu", "--json").stdout)
    assert best["record"] == tuned["best"]
    assert best["current"] is True
    assert best["record"]["measurement"]["latency_us"] > 0
    assert best["record"]["torch_us"] > 0
    trials = json.loads(run(environment, "show", "--all", "--json").stdout)
    assert len(trials) == tuned["trials"]


def test_why_serves_what_was_tuned(environment: dict[str, str], tuned: dict[str, object]) -> None:
    [answer] = json.loads(run(environment, "why", SHAPE, "--arch", "cpu", "--json").stdout)
    assert answer["rule"] == "exact"
    assert answer["record"] == tuned["best"]


def test_a_second_run_goes_on_from_the_first(
    environment: dict[str, str], tuned: dict[str, object]
) -> None:
    arguments = (
        "plan",
        "--arch",
        "cpu",
        "--shape",
        SHAPE,
        "--effort",
        "normal",
        "--trials",
        "3",
        "--json",
    )
    [plan] = json.loads(run(environment, *arguments).stdout)["problems"]
    assert plan["already_tried"] == tuned["trials"]


def test_bench_sets_it_beside_its_peers(
    environment: dict[str, str], tuned: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "bench.json"
    done = run(
        environment, "bench", "--arch", "cpu", "--shape", SHAPE, "--providers",
        "autoflash,sdpa,fa2", "--rounds", "2", "--budget-ms", "5", "--out", str(file),
    )  # fmt: skip
    assert SHAPE.replace("h2d", "h2/2d") in done.stdout
    report = json.loads(file.read_text())
    rows = {row["provider"]: row for row in report["rows"]}
    assert set(rows) == {"autoflash", "sdpa", "fa2"}
    assert rows["autoflash"]["rule"] == "exact"
    assert rows["autoflash"]["latency_us"] > 0
    assert rows["autoflash"]["tflops"] > 0
    assert report["environment"]


@pytest.mark.compile
def test_an_absent_gpu_is_compiled_for_and_ranked(environment: dict[str, str]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (8, 0):
        pytest.skip("there is an sm80 device here, so nothing is predicted for one")
    shape = "b1s1024h8d64c-bfloat16"
    done = run(environment, "tune", "--arch", "sm80", "--shape", shape, "--trials", "2", "--json")
    [result] = json.loads(done.stdout)["results"]
    assert result["status"] == "predicted"
    times = [each["predicted_us"] for each in result["ranked"]]
    assert times
    assert times == sorted(times)
    assert all(each["resources"]["registers"] > 0 for each in result["ranked"])
    [best] = json.loads(run(environment, "show", "--arch", "sm80", "--json").stdout)
    assert best["record"]["outcome"] == "predicted"


def interruptible() -> None:
    """Ctrl-C works in this process even if the tests run where it is ignored, as under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_was_found(environment: dict[str, str]) -> None:
    other = "b1s192h2d48f-float32"
    process = subprocess.Popen(
        [sys.executable, "-m", "autoflash", "tune", "--arch", "cpu", "--shape", other,
         "--trials", "200", "--effort", "normal"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip

    def trials() -> int:
        said = run(environment, "show", "--all", "--shape", other, "--json").stdout
        return len(json.loads(said))

    try:
        deadline = time.monotonic() + 120
        while not trials():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no trial was stored"
        # As a terminal does it: to the whole foreground group.
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 4, err
    assert "Traceback" not in err
    assert "partial" in out
    assert trials() > 0
