"""Ctrl-C and kill -9 of a tuner: what it leaves running, what it leaves stored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.faults import EFFORT, PROBLEM, TEMPLATES, catalog, children, died, gone

from autoflash import device, settings
from autoflash.database import Database
from autoflash.tuning.process import environment, family
from autoflash.tuning.tuner import tune

STOP_S = 2.0


def start(tmp_path: Path, fault: str) -> subprocess.Popen[str]:
    """A process that tunes, prints a line per trial, and comes to a stop in a kernel that hangs."""
    script = f"""
import dataclasses, sys, time
from pathlib import Path
from autoflash import device
from autoflash.codegen.catalog import Catalog
from autoflash.config import Config
from autoflash.database import Database
from autoflash.problem import Problem
from autoflash.tuning import run, trials
from autoflash.tuning.effort import EFFORTS
from autoflash.tuning.tuner import tune

def tell(event):
    print(event.kind, event.done, event.record.outcome if event.record else "-", flush=True)

# The default first, then what hangs.
hangs = Config.of("cpp/naive", {{"delay_us": 0, "fault": {fault!r}, "twin": 0, "name": "a"}})
run.Run.nearest = lambda self, problem: [hangs]
evaluate_request = trials.evaluate_request
def announced(*arguments):
    print("evaluate", 0, "-", flush=True)
    return evaluate_request(*arguments)
trials.evaluate_request = announced
effort = dataclasses.replace(EFFORTS["quick"], seconds=None, evaluate_timeout_s=100.0)
results = tune(
    [Problem.parse({PROBLEM.name!r})], device.for_arch("cpu"), effort=effort, on_event=tell,
    database=Database.open("sqlite:///{tmp_path}/tuning.db"),
    catalog=Catalog.load(Path({str(TEMPLATES)!r})),
)
print("result", results[0].status, results[0].trials, flush=True)
"""
    env = environment(cache_dir=settings.get().cache_dir, visible=None) | {"AUTOFLASH_JOBS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C works there even if the tests run where it is ignored, as under nohup.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=env,
    )


@pytest.mark.parametrize("fault", ["endless", "background"])
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_and_goes_on(
    way: int, fault: str, tmp_path: Path
) -> None:
    with start(tmp_path, fault) as tuner:
        lines = []
        for line in tuner.stdout:
            lines.append(line.split())
            if [each[0] for each in lines].count("evaluate") == 2:
                break
        workers = children(tuner.pid)
        assert workers
        below = {pid for worker in workers for pid in family(worker)}
        os.kill(tuner.pid, way)
        rest, _ = tuner.communicate(timeout=STOP_S)
    assert all(gone(worker) for worker in workers)
    assert all(died(pid) for pid in below)
    lines += [line.split() for line in rest.splitlines()]
    told = [line[2] for line in lines if line[0] == "trial" and line[2] != "-"]
    with Database.open(f"sqlite:///{tmp_path}/tuning.db") as database:
        before = database.trials()
        status = database.runs()[0]["status"]
        assert [record.outcome for record in before] == told == ["ok"]
        if way == signal.SIGINT:
            assert lines[-1] == ["result", "partial", "1"]
            assert tuner.returncode == 0
            assert status == "interrupted"
        else:
            assert tuner.returncode == -signal.SIGKILL
            assert status == "running"
        (result,) = tune(
            [PROBLEM],
            device.for_arch("cpu"),
            database=database,
            effort=EFFORT,
            catalog=catalog(),
            max_trials=len(before) + 1,
        )
        after = database.trials()
    assert result.trials == 2
    assert after[: len(before)] == before


def test_a_worker_that_holds_its_interpreter_dies_with_a_tuner_that_is_killed(
    tmp_path: Path,
) -> None:
    # A launch or a compiler in C that hangs without giving up the interpreter's lock: no thread of
    # the worker can run.
    stuck = tmp_path / "stuck.py"
    stuck.write_text(
        textwrap.dedent(
            """
            import ctypes, os, subprocess, sys
            from autoflash.tuning import guard
            guard.set_limits(None)
            guard.enter(sys.argv[1])
            subprocess.Popen(["sleep", "300"], start_new_session=True)
            ctypes.PyDLL(None).sleep(300)
            """
        )
    )
    parent = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from autoflash.tuning.process import Process, environment
        env = environment(cache_dir=Path({str(tmp_path)!r}), visible="")
        process = Process("compile", env, command=(sys.executable, {str(stuck)!r}))
        process.submit({{"kind": "compile"}}, 300)
        print(process.pid, flush=True)
        time.sleep(300)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(cache_dir=tmp_path, visible=""),
    ) as tuner:
        leader = int(tuner.stdout.readline())
        limit = time.monotonic() + 30
        while len(family(leader)) < 3 and time.monotonic() < limit:
            time.sleep(0.02)
        everyone = family(leader)
        assert len(everyone) == 3  # the worker, its watcher, and what it sent into the background
        tuner.send_signal(signal.SIGKILL)
    assert gone(leader)
    assert all(died(pid) for pid in everyone)
