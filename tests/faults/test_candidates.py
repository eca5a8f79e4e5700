"""Kernels that crash, hang, starve and scribble: real ones, built the normal way, on this CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.faults import PROBLEM, catalog, config, died, swept

from autoflash import device, settings
from autoflash.tuning import wire
from autoflash.tuning.process import Process, environment

pytestmark = pytest.mark.slow

# Fault -> outcome, and a word of the reason.
FAULTS = {
    "broken": ("compile_error", "error"),
    "refuse": ("runtime_error", "returned 7"),
    "abort": ("crash", "SIGABRT"),
    "segfault": ("crash", "SIGSEGV"),
    "misaligned": ("crash", "SIG"),
    "exit": ("crash", "status 3"),
    "killed": ("crash", "SIGKILL"),
    "background": ("crash", "status 4"),
    "hang": ("timeout", "no answer"),
    "endless": ("timeout", "no answer"),
    "memory": ("crash", "SIGABRT"),
    "chatter": ("timeout", "a line of no use"),
    "leak": ("runtime_error", "did not give it back"),
    "garbage": ("crash", "cannot be read"),
    "half": ("crash", "status 5"),
    "astray": ("wrong_result", "outside of out"),
}
RIGHT = (config(), config(twin=1), config(delay_us=3000), config(delay_us=3000, name="b"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_stored_with_its_outcome_and_reason(fault: str) -> None:
    _, last, _ = swept()
    outcome, reason = FAULTS[fault]
    record = last[config(fault)]
    assert record.outcome == outcome
    assert reason in record.reason
    assert record.measurement is None


def test_those_that_come_after_a_fault_are_timed_as_ever() -> None:
    result, last, _ = swept()
    assert {last[each].outcome for each in RIGHT[:2]} == {"ok"}
    assert {last[each].outcome for each in RIGHT[2:]} <= {"ok", "slow"}  # as the best so far is
    for each in RIGHT:
        latency_us = last[each].latency_us
        # A sleep never ends early; without one the kernel takes some ten microseconds.
        assert latency_us > 3000 if each["delay_us"] else latency_us < 3000
    assert last[config(delay_us=40000)].outcome == "slow"
    assert result.status == "improved"
    assert result.best.config in (config(), config(twin=1), config("slow_first"))
    assert result.best.latency_us < 3000 < result.best.default_us
    assert result.best.torch_us > 0
    assert result.best.torch_provider
    assert result.best.error_ratio <= 2
    assert result.best.environment["torch"]
    assert result.best.resources["binary_bytes"] > 0


def test_a_crash_in_a_process_that_was_used_is_tried_in_a_fresh_one() -> None:
    _, last, every = swept()
    doubtful = [record for record in every if record.reason.startswith("to be run again: ")]
    assert doubtful
    for record in doubtful:
        assert record.outcome in ("crash", "runtime_error")
        assert last[record.config] is not record
        assert not last[record.config].reason.startswith("to be run again: ")
    assert len(every) == len(last) + len(doubtful)


def test_what_a_kernel_left_in_the_background_dies_with_its_worker(tmp_path: Path) -> None:
    cpu = device.for_arch("cpu")
    source = catalog().get("cpp/naive").render(config("background"), PROBLEM, cpu)
    request = {
        "kind": "evaluate", "source": wire.source_to_dict(source), "problem": PROBLEM.to_dict(),
        "device": cpu.to_dict(), "seed": 0, "timing_ms": 2.0, "best_us": None,
    }  # fmt: skip
    env = environment(cache_dir=settings.get().cache_dir, visible=None, scratch=tmp_path)
    process = Process("device", env)
    try:
        process.submit(request, 60.0)
        while (reply := process.poll()) is None:
            time.sleep(0.01)
    finally:
        process.close()
    assert (reply["outcome"], reply["reason"]) == ("crash", "the worker exited with status 4")
    (child,) = (tmp_path / "background").read_text().split()
    assert died(int(child))
