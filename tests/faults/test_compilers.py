"""Compilers that hang with all their children, take all memory, or have no disk to write to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults import EFFORT, PROBLEM, catalog, config, died, gone

from autoflash import device, errors
from autoflash.database import Database
from autoflash.tuning import wire
from autoflash.tuning.process import Process, environment, family
from autoflash.tuning.tuner import tune

Compiler = Callable[[str], Path]


@pytest.fixture
def compiler(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A g++ that first runs some lines of shell where a source has fault "refuse"."""

    def make(lines: str) -> Path:
        script = tmp_path / "fickle-g++"
        script.write_text(
            "#!/bin/sh\n"
            'for each in "$@"; do case "$each" in *.cpp) source="$each";; esac; done\n'
            f'if [ -n "$source" ] && grep -q "return 7;" "$source"; then\n{lines}\nfi\n'
            'exec g++ "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("AUTOFLASH_CXX", str(script))
        from autoflash import settings

        settings.get.cache_clear()
        return script

    return make


def request_for(fault: str) -> dict:
    cpu = device.for_arch("cpu")
    source = catalog().get("cpp/naive").render(config(fault), PROBLEM, cpu)
    return {
        "kind": "compile",
        "source": wire.source_to_dict(source),
        "device": cpu.to_dict(),
    }


def answer(process: Process, request: dict, timeout_s: float) -> dict:
    process.submit(request, timeout_s)
    while (reply := process.poll()) is None:
        time.sleep(0.01)
    return reply


def test_a_compiler_that_hangs_dies_with_children_in_sessions_of_their_own(
    compiler: Compiler, cache_dir: Path
) -> None:
    compiler("setsid sleep 300 &\nsetsid sh -c 'sleep 300 & sleep 300' &\nsleep 300")
    process = Process("compile", environment(cache_dir=cache_dir, visible=""))
    try:
        # The first request waits for the start too: let that pass.
        assert answer(process, {"kind": "dance"}, 60.0)["outcome"] == "runtime_error"
        process.submit(request_for("refuse"), timeout_s=4.0)
        leader = process.pid
        seen: set[int] = set()
        while (reply := process.poll()) is None:
            seen |= set(family(leader))
            time.sleep(0.02)
        assert reply["outcome"] == "timeout"
        assert len(seen) >= 8  # worker, watcher, ninja, shells, compiler and four sleepers
        assert gone(leader)
        assert all(died(pid) for pid in seen)
        # The next one is compiled by a process that is as new.
        assert answer(process, request_for("none"), 60.0)["outcome"] == "ok"
    finally:
        process.close()


def test_a_compiler_that_takes_all_memory_fails_alone(compiler: Compiler, cache_dir: Path) -> None:
    # Zeros that nobody looks at take no memory, so that this harms no machine.
    compiler("exec python3 -c 'held = [bytes(1 << 28) for _ in range(64)]'")
    env = environment(cache_dir=cache_dir, visible="")
    process = Process("compile", env, memory_bytes=2 << 30)
    try:
        reply = answer(process, request_for("refuse"), 60.0)
        assert (reply["outcome"], "raise" in reply) == ("compile_error", False)
        assert "MemoryError" in reply["stderr"]
        assert answer(process, request_for("none"), 60.0)["outcome"] == "ok"
        assert process.starts == 1
    finally:
        process.close()


def test_a_run_goes_on_past_a_compiler_that_hangs(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("sleep 300")
    monkeypatch.setattr("autoflash.tuning.process.START_S", 10.0)
    effort = dataclasses.replace(EFFORT, compile_timeout_s=12.0)
    template = "cpp/naive"
    with Database.open("sqlite://") as database:
        # Known already: everything but the default, its like without a delay, and the one to hang.
        known = {config(), config(delay_us=3000), config("refuse")}
        cpu = device.for_arch("cpu")
        space = catalog().get(template).space(PROBLEM, cpu)
        from autoflash.tuning.run import Run
        from autoflash.tuning.timing import policy_for

        run = Run(
            device=cpu, templates=catalog().templates, database=database, effort=effort,
            policy=policy_for(cpu).id, workers=None, seed=0, jobs=1,
        )  # fmt: skip
        for each in space.configs:
            if each not in known:
                database.add(run.record(PROBLEM, each, "runtime_error", reason="known"))
        (result,) = tune([PROBLEM], cpu, database=database, effort=effort, catalog=catalog())
        last = {record.config: record for record in database.trials()}
    assert (last[config("refuse")].outcome, last[config()].outcome) == ("timeout", "ok")
    assert "compiling: no answer in" in last[config("refuse")].reason
    assert (result.status, result.best.config) == ("improved", config())


def test_a_disk_that_is_full_while_compiling_is_no_fault_of_the_source(
    compiler: Compiler, cache_dir: Path
) -> None:
    compiler("echo 'fatal error: error writing: No space left on device' >&2; exit 1")
    process = Process("compile", environment(cache_dir=cache_dir, visible=""))
    try:
        reply = answer(process, request_for("refuse"), 60.0)
    finally:
        process.close()
    assert reply["raise"] == "CacheError"
    assert "no space left" in reply["reason"]


def test_a_directory_that_breaks_while_compiling_is_no_fault_of_the_source(
    compiler: Compiler, cache_dir: Path
) -> None:
    # Where the kernels would be lies a file.
    cache_dir.mkdir()
    (cache_dir / "kernels").write_text("")
    with Database.open("sqlite://") as database:
        with pytest.raises(errors.CacheError, match="cannot be built"):
            tune(
                [PROBLEM],
                device.for_arch("cpu"),
                database=database,
                effort=EFFORT,
                catalog=catalog(),
            )
        assert database.trials() == []
