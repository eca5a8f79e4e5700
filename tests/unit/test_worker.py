"""Worker processes answer, are killed when they hang, and leave nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoflash import device, settings
from autoflash.codegen.catalog import Catalog
from autoflash.codegen.template import Source
from autoflash.config import Config
from autoflash.device import Device
from autoflash.problem import Problem
from autoflash.tuning import process as process_module
from autoflash.tuning import wire
from autoflash.tuning.pool import Finished, Pool
from autoflash.tuning.process import Process, environment, session_members

FAULTY = Path(__file__).parents[1] / "faults" / "templates"
PROBLEM = Problem.parse("b1s48h2/2d16c-float32")


@pytest.fixture(scope="module")
def cpu() -> Device:
    return device.for_arch("cpu")


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[Process]:
    role = getattr(request, "param", "compile")
    env = environment(cache_dir=settings.get().cache_dir, visible="")
    process = Process(role, env)
    yield process
    process.close()


def render(cpu: Device, fault: str = "none", delay_us: int = 0) -> Source:
    template = Catalog.load(FAULTY).get("cpp/naive")
    config = Config.of(
        template.name, {"fault": fault, "delay_us": delay_us, "twin": 0, "name": "a"}
    )
    return template.render(config, PROBLEM, cpu)


def compile_request(source: Source, cpu: Device) -> dict:
    source_dict = wire.source_to_dict(source)
    return {"kind": "compile", "source": source_dict, "device": cpu.to_dict()}


def evaluate_request(source: Source, cpu: Device, best_us: float | None = None) -> dict:
    return {
        "kind": "evaluate",
        "source": wire.source_to_dict(source),
        "problem": PROBLEM.to_dict(),
        "device": cpu.to_dict(),
        "seed": 0,
        "timing_ms": 2.0,
        "best_us": best_us,
    }


def answer(process: Process, request: dict, timeout_s: float = 60.0) -> dict:
    process.submit(request, timeout_s)
    while (reply := process.poll()) is None:
        time.sleep(0.005)
    return reply


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a session empties in time."""
    limit = time.monotonic() + within_s
    while session_members(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    return not session_members(pid)


# The wire ---------------------------------------------------------------------------------------


def test_messages_are_read_back_piece_by_piece() -> None:
    first, second = {"a": [1, 2.5, None]}, {"b": "ü" * 100}
    stream = wire.pack(first) + wire.pack(second)
    for cut in range(len(wire.pack(first))):
        assert wire.unpack(stream[:cut]) is None
    message, used = wire.unpack(stream)
    assert message == first
    assert wire.unpack(stream[used:]) == (second, len(stream) - used)


@pytest.mark.parametrize("text", [b"hello world", b"\0\0\0\4[1] ", b"\0\0\0\3{a}"])
def test_what_is_no_message_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"message|property name"):
        wire.unpack(text)


def test_a_source_survives_the_wire(cpu: Device) -> None:
    source = render(cpu)
    message, _ = wire.unpack(wire.pack(wire.source_to_dict(source)))
    assert wire.source_from_dict(message) == source


# Compile workers --------------------------------------------------------------------------------


def test_a_compile_worker_reports_resources_and_errors(worker: Process, cpu: Device) -> None:
    good = answer(worker, compile_request(render(cpu), cpu))
    assert good["outcome"] == "ok"
    assert good["resources"]["binary_bytes"] > 1000
    bad = answer(worker, compile_request(render(cpu, fault="broken"), cpu))
    assert bad["outcome"] == "compile_error"
    assert "error" in bad["reason"]
    assert worker.starts == 1


def test_a_missing_compiler_is_not_the_candidates_fault(
    cpu: Device, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    env = environment(cache_dir=cache_dir, visible="") | {"AUTOFLASH_CXX": "no-such-compiler"}
    process = Process("compile", env)
    try:
        reply = answer(process, compile_request(render(cpu), cpu))
    finally:
        process.close()
    assert reply["raise"] == "ToolchainMissing"
    assert "no-such-compiler" in reply["reason"]


def test_a_compiler_that_hangs_is_killed_with_its_children(cpu: Device, tmp_path: Path) -> None:
    script = tmp_path / "slow-g++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo slow 1.0; exit 0;; esac\nsleep 300\n'
    )
    script.chmod(0o755)
    env = environment(cache_dir=tmp_path / "cache", visible="") | {"AUTOFLASH_CXX": str(script)}
    process = Process("compile", env)
    try:
        # The first request waits for the start too: let that pass.
        assert answer(process, {"kind": "compile", "source": {}, "device": {}})["outcome"]
        process.submit(compile_request(render(cpu), cpu), timeout_s=5.0)
        session = process.pid
        assert session is not None
        groups = set()
        while (reply := process.poll()) is None:
            for pid in session_members(session):
                with contextlib.suppress(ProcessLookupError):
                    groups.add(os.getpgid(pid))
            time.sleep(0.02)
    finally:
        process.close()
    assert reply["outcome"] == "timeout"
    assert "5 s" in reply["reason"]
    assert len(groups) > 1  # ninja put the compiler into a group of its own, yet it is gone
    assert gone(session)


def test_an_unknown_request_is_an_answer_not_a_death(worker: Process) -> None:
    reply = answer(worker, {"kind": "dance"})
    assert reply["outcome"] == "runtime_error"
    assert "dance" in reply["reason"]
    assert worker.pid is not None


# Device workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["device"], indirect=True)
def test_a_device_worker_survives_what_can_be_survived(worker: Process, cpu: Device) -> None:
    hello = answer(worker, {"kind": "hello", "device": cpu.to_dict()})
    assert hello["outcome"] == "ok"
    assert {"torch", "python", "autoflash"} <= set(hello["environment"])

    good = answer(worker, evaluate_request(render(cpu), cpu))
    assert good["outcome"] == "ok"
    assert good["measurement"]["latency_us"] > 0
    assert good["error_ratio"] <= 2

    wrong = answer(worker, evaluate_request(render(cpu, fault="skip"), cpu))
    assert wrong["outcome"] == "wrong_result"
    assert "out" in wrong["reason"]

    refused = answer(worker, evaluate_request(render(cpu, fault="refuse"), cpu))
    assert refused["outcome"] == "runtime_error"
    assert "returned 7" in refused["reason"]

    best_us = good["measurement"]["latency_us"]
    slow = answer(worker, evaluate_request(render(cpu, delay_us=40000), cpu, best_us))
    assert slow["outcome"] == "slow"
    assert slow["measurement"]["count"] == 3
    assert worker.starts == 1


@pytest.mark.parametrize("worker", ["device"], indirect=True)
def test_crash_and_hang_cost_one_process_each(worker: Process, cpu: Device) -> None:
    crash = answer(worker, evaluate_request(render(cpu, fault="abort"), cpu))
    assert crash["outcome"] == "crash"
    assert "SIGABRT" in crash["reason"]
    assert "Fatal Python error: Aborted" in crash["stderr"]
    assert worker.pid is None

    assert answer(worker, {"kind": "hello", "device": cpu.to_dict()})["outcome"] == "ok"
    worker.submit(evaluate_request(render(cpu, fault="hang"), cpu), timeout_s=1.5)
    session = worker.pid
    while (reply := worker.poll()) is None:
        time.sleep(0.01)
    assert reply["outcome"] == "timeout"
    assert gone(session)
    assert worker.starts == 2


@pytest.mark.parametrize("worker", ["device"], indirect=True)
def test_a_worker_that_is_killed_says_by_what(worker: Process, cpu: Device) -> None:
    worker.submit(evaluate_request(render(cpu, fault="hang"), cpu), timeout_s=60.0)
    time.sleep(0.2)
    os.kill(worker.pid, signal.SIGKILL)
    while (reply := worker.poll()) is None:
        time.sleep(0.01)
    assert (reply["outcome"], reply["reason"]) == ("crash", "killed by SIGKILL")


@pytest.mark.parametrize("role", ["compile", "device"])
def test_workers_die_with_a_tuner_that_is_killed(role: str, cpu: Device, tmp_path: Path) -> None:
    # The worker is busy with a kernel that never ends, or a compiler that does not.
    compiler, compiling = tmp_path / "slow-g++", tmp_path / "compiling"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo slow 1.0; exit 0;; esac\n'
        f"touch {compiling}\nsleep 300\n"
    )
    compiler.chmod(0o755)
    request = evaluate_request(render(cpu, fault="hang"), cpu)
    if role == "compile":
        request = compile_request(render(cpu), cpu)
    parent = textwrap.dedent(
        """
        import json, sys, time
        from pathlib import Path
        from autoflash.tuning.process import Process, environment
        role, cache_dir, compiler = sys.argv[1:]
        env = environment(cache_dir=Path(cache_dir), visible="")
        if role == "compile":
            env["AUTOFLASH_CXX"] = compiler
        process = Process(role, env)
        process.submit(json.load(sys.stdin), 300)
        print(process.pid, flush=True)
        while process.poll() is None:
            time.sleep(0.05)
        """
    )
    cache_dir = settings.get().cache_dir if role == "device" else tmp_path / "cache"
    command = [sys.executable, "-c", parent, role, str(cache_dir), str(compiler)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(cache_dir=cache_dir, visible=""),
    ) as tuner:
        try:
            tuner.stdin.write(json.dumps(request))
            tuner.stdin.close()
            session = int(tuner.stdout.readline())
            limit = time.monotonic() + 60
            while role == "compile" and not compiling.exists() and time.monotonic() < limit:
                time.sleep(0.02)
            # The watcher, and for a compiler at least: worker, ninja, shell.
            assert len(session_members(session)) >= (4 if role == "compile" else 1)
        finally:
            tuner.send_signal(signal.SIGKILL)
    assert gone(session)


def test_what_forks_while_it_is_killed_is_killed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fork falls between each of the first looks and its kill; 7 asks and is spared.
    looks = iter([[7, 10], [7, 10, 11], [7, 11, 12], [7, 12, 13], [7, 13]])
    killed = []
    monkeypatch.setattr(process_module, "family", lambda leader: next(looks))
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    process_module.kill_sessions([7], spare=7)
    assert killed == [10, 11, 12, 13]
    assert next(looks, None) is None


def test_killing_gives_up_on_what_forks_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = itertools.count(10)
    monkeypatch.setattr(process_module, "family", lambda leader: [next(fresh)])
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    process_module.kill_sessions([7])
    assert next(fresh) > 100


# The pool ---------------------------------------------------------------------------------------


def test_the_pool_compiles_side_by_side_and_forgets_what_is_cancelled(
    cpu: Device, tmp_path: Path
) -> None:
    pool = Pool(jobs=2, cache_dir=tmp_path, visible=None)
    try:
        for delay_us in (0, 3000, 40000):
            source = render(cpu, delay_us=delay_us)
            pool.submit("compile", str(delay_us), compile_request(source, cpu), 60.0)
        assert pool.pending("compile") == 3
        assert len(pool.pids()) == 2
        finished: list[Finished] = []
        while pool.pending("compile"):
            finished += pool.wait(1.0)
        assert sorted(f.key for f in finished) == ["0", "3000", "40000"]
        assert all(f.reply["outcome"] == "ok" for f in finished)

        pool.submit("compile", "again", compile_request(render(cpu), cpu), 60.0)
        assert pool.cancel("compile") == ["again"]
        assert pool.pending("compile") == 0
        assert pool.wait(0.1) == []
    finally:
        sessions = pool.pids()
        scratch = pool._scratch
        (scratch / "left-by-a-compiler").touch()
        pool.close()
    assert pool.pids() == []
    assert not scratch.exists()
    assert all(gone(session) for session in sessions)


def test_many_workers_are_found_by_one_look_at_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A look takes milliseconds: one for each of 64 compilers would hold up Ctrl-C.
    sleeper = (sys.executable, "-c", "import time; time.sleep(600)")
    pool = Pool(jobs=3, cache_dir=tmp_path, visible=None, command=sleeper)
    for number in range(3):
        pool.submit("compile", str(number), {"kind": "compile"}, 60.0)
    sessions, looks, real = pool.pids(), [], process_module._processes

    def look() -> dict[int, tuple[int, int]] | None:
        looks.append(1)
        return real()

    monkeypatch.setattr(process_module, "_processes", look)
    pool.close()
    assert len(sessions) == 3
    assert len(looks) == 2
    assert all(gone(session) for session in sessions)
