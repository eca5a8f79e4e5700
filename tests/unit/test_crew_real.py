"""Several devices with real processes: the CPU, taken twice, as if it were two."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.faults import children

from autoflash import device, settings
from autoflash.codegen.catalog import Catalog
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning.boards import Board
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.process import environment, session_members
from autoflash.tuning.tuner import Event, tune

FAULTY = Path(__file__).parents[1] / "faults" / "templates"
PROBLEMS = [Problem.parse(f"b1s48h{heads}d16c-float32") for heads in (2, 3)]
EFFORT = dataclasses.replace(
    EFFORTS["quick"], seconds=None, evaluate_timeout_s=9.0, timing_ms=5.0, finals_ms=5.0
)


def boards() -> list[Board]:
    return [Board(index=i, device=device.for_arch("cpu"), visible=str(i)) for i in range(2)]


def start(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that tunes, and prints a line per trial."""
    script = f"""
import dataclasses
from pathlib import Path
from autoflash import device
from autoflash.codegen.catalog import Catalog
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning.boards import Board
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.tuner import tune

def tell(event):
    print(event.kind, event.device, event.record.outcome if event.record else "-", flush=True)

cpu = device.for_arch("cpu")
results = tune(
    [Problem.parse(name) for name in {[problem.name for problem in PROBLEMS]!r}], cpu,
    effort=dataclasses.replace(EFFORTS["quick"], seconds=None, evaluate_timeout_s=100.0),
    database=Database.open("sqlite:///{tmp_path}/tuning.db"), on_event=tell,
    catalog=Catalog.load(Path({str(FAULTY)!r})),
    boards=[Board(index=i, device=cpu, visible=str(i)) for i in range(2)],
)
print("result", *(result.status for result in results), flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C works there even if the tests run where it is ignored, as under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=environment(cache_dir=settings.get().cache_dir, visible=None) | {"AUTOFLASH_JOBS": "2"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_of_any_device(way: int, tmp_path: Path) -> None:
    # Each comes to a stop in the kernel that hangs, with a time-out far away.
    with start(tmp_path) as tuner:
        lines, timed = [], set()
        for line in tuner.stdout:
            lines.append(line.split())
            if lines[-1][0] == "trial" and lines[-1][-1] == "ok":
                timed.add(lines[-1][1])
            if timed == {"0", "1"}:
                break
        workers = children(tuner.pid)
        assert len(workers) == 4  # two that compile, one for each device
        began = time.monotonic()
        os.kill(tuner.pid, way)
        rest, _ = tuner.communicate(timeout=60)
    while any(session_members(worker) for worker in workers) and time.monotonic() - began < 30:
        time.sleep(0.02)
    assert not any(session_members(worker) for worker in workers)
    lines += [line.split() for line in rest.splitlines()]
    with Database.open(f"sqlite:///{tmp_path}/tuning.db") as database:
        status = database.runs()[0]["status"]
        assert {record.problem for record in database.trials()} == set(PROBLEMS)
    if way == signal.SIGINT:
        assert lines[-1] == ["result", "partial", "partial"]
        assert (tuner.returncode, status) == (0, "interrupted")
    else:
        assert (tuner.returncode, status) == (-signal.SIGKILL, "running")


@pytest.mark.slow
def test_faults_on_one_device_do_not_touch_the_other() -> None:
    events: list[Event] = []
    with Database.open("sqlite://") as database:
        results = tune(
            PROBLEMS,
            device.for_arch("cpu"),
            database=database,
            effort=EFFORT,
            catalog=Catalog.load(FAULTY),
            on_event=events.append,
            boards=boards(),
        )
        for problem in PROBLEMS:
            outcomes = {record.outcome for record in database.trials(problem=problem)}
            assert {"ok", "slow", "crash", "timeout", "wrong_result", "compile_error"} <= outcomes
    assert [result.status for result in results] == ["improved"] * 2
    wrong = ("abort", "hang", "skip", "refuse", "broken")
    assert all(result.best.config["fault"] not in wrong for result in results)
    assert all(result.best.torch_us for result in results)
    assert {event.device for event in events} == {"0", "1"}
