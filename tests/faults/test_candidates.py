"""The tuning loop with real compilers, real kernels and real faults, on the CPU."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoflash import device, errors, settings
from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.lock import device_lock
from autoflash.tuning.process import environment, session_members
from autoflash.tuning.tuner import tune

FAULTY = Path(__file__).parents[1] / "data" / "faulty"
CATALOG = Catalog.load(FAULTY)
PROBLEM = Problem.parse("b1s48h2/2d16c-float32")
EFFORT = dataclasses.replace(
    EFFORTS["quick"], seconds=None, evaluate_timeout_s=9.0, timing_ms=5.0, finals_ms=5.0
)


def config(fault: str = "none", delay_us: int = 0, twin: int = 0) -> Config:
    return Config.of("cpp/naive", {"delay_us": delay_us, "fault": fault, "twin": twin})


def test_every_fault_costs_one_trial_and_the_right_config_wins() -> None:
    with Database.open("sqlite://") as database:
        (result,) = tune(
            [PROBLEM], device.for_arch("cpu"), database=database, effort=EFFORT, catalog=CATALOG
        )
        outcomes = {record.config: record.outcome for record in database.trials()}
    assert outcomes == {
        config(delay_us=3000): "ok",
        config(): "ok",
        config(twin=1): "ok",
        config(delay_us=40000): "slow",
        config("abort"): "crash",
        config("hang"): "timeout",
        config("skip"): "wrong_result",
        config("refuse"): "runtime_error",
        config("broken"): "compile_error",
    }
    assert result.status == "improved"
    assert result.best.config in (config(), config(twin=1))
    assert result.best.latency_us < 3000 < result.best.default_us
    assert result.best.torch_us > 0
    assert result.best.torch_provider
    assert result.best.error_ratio <= 2
    assert result.best.environment["torch"]
    assert result.best.resources["binary_bytes"] > 0


def start(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that tunes, and prints a line per trial."""
    script = f"""
import dataclasses, sys
from pathlib import Path
from autoflash import device
from autoflash.codegen.catalog import Catalog
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.tuner import tune

def tell(event):
    print(event.kind, event.done, event.record.outcome if event.record else "-", flush=True)

effort = dataclasses.replace(EFFORTS["quick"], seconds=None, evaluate_timeout_s=100.0)
results = tune(
    [Problem.parse({PROBLEM.name!r})], device.for_arch("cpu"), effort=effort, on_event=tell,
    database=Database.open("sqlite:///{tmp_path}/tuning.db"),
    catalog=Catalog.load(Path({str(FAULTY)!r})),
)
print("result", results[0].status, results[0].trials, flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C works there even if the tests run where it is ignored, as under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=environment(cache_dir=settings.get().cache_dir, visible=None) | {"AUTOFLASH_JOBS": "1"},
    )


def children(pid: int) -> list[int]:
    """Processes with this parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "stat").exists():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_and_goes_on(way: int, tmp_path: Path) -> None:
    # It comes to a stop in the kernel that hangs, with a time-out far away.
    with start(tmp_path) as tuner:
        lines = []
        for line in tuner.stdout:
            lines.append(line.split())
            if lines[-1][0] == "trial" and lines[-1][2] == "ok":
                break
        workers = children(tuner.pid)
        assert workers
        began = time.monotonic()
        os.kill(tuner.pid, way)
        rest, _ = tuner.communicate(timeout=30)
    while any(session_members(worker) for worker in workers) and time.monotonic() - began < 10:
        time.sleep(0.02)
    assert not any(session_members(worker) for worker in workers)
    lines += [line.split() for line in rest.splitlines()]
    with Database.open(f"sqlite:///{tmp_path}/tuning.db") as database:
        before = database.trials()
        status = database.runs()[0]["status"]
        if way == signal.SIGINT:
            assert lines[-1] == ["result", "partial", str(len(before))]
            assert tuner.returncode == 0
            assert status == "interrupted"
        else:
            assert tuner.returncode == -signal.SIGKILL
            assert status == "running"
        assert 1 <= len(before) < 9
        (result,) = tune(
            [PROBLEM],
            device.for_arch("cpu"),
            database=database,
            effort=EFFORT,
            catalog=CATALOG,
            max_trials=len(before) + 1,
        )
        after = database.trials()
    assert result.status in ("improved", "unimproved")
    assert after[: len(before)] == before
    assert len({record.config for record in after}) == len(after) == len(before) + 1


def test_two_runs_do_not_share_a_device(cache_dir: Path) -> None:
    cpu = device.for_arch("cpu")
    with device_lock(cpu, None, cache_dir):
        with (
            pytest.raises(errors.CacheError, match=rf"{os.getpid()}.*waited 0 s"),
            device_lock(cpu, None, cache_dir, wait_s=0.1),
        ):
            pass
        with device_lock(cpu, "1", cache_dir, wait_s=0.1):
            assert len(list((cache_dir / "locks").glob("*.pid"))) == 2
    with device_lock(cpu, None, cache_dir, wait_s=0.1):
        pass
    assert not list((cache_dir / "locks").glob("*.pid"))


def test_a_read_only_cache_still_tunes(tmp_path: Path, cache_dir: Path) -> None:
    cache_dir.write_text("a file where the directory would be")
    with Database.open("sqlite://") as database, pytest.warns(RuntimeWarning, match="cannot write"):
        (result,) = tune(
            [PROBLEM],
            device.for_arch("cpu"),
            database=database,
            effort=EFFORT,
            catalog=CATALOG,
            max_trials=1,
        )
    assert (result.status, result.trials) == ("unimproved", 1)
