"""What AUTOFLASH_RECORD leaves behind of a process's calls, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import autoflash
from autoflash import settings
from autoflash.codegen.catalog import Catalog
from autoflash.device import native
from autoflash.problem import Problem
from autoflash.runtime import recording, serving
from autoflash.runtime.dispatch import Dispatcher
from autoflash.workload import listing

NAME = "b1s16h2/2d64c-float32"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Calls are recorded there, and served by PyTorch: there are no templates."""
    serving.reset()
    monkeypatch.setenv("AUTOFLASH_RECORD", str(tmp_path / "ran.txt"))
    settings.get.cache_clear()
    nothing = Dispatcher(native(), [], Catalog(tmp_path, {}))
    serving.use("cpu", 0, nothing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PyTorch serves")
        yield tmp_path / "ran.txt"
        serving.reset()
    monkeypatch.undo()
    settings.get.cache_clear()


def tensor(rows: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(1, rows, 2, 64, dtype=dtype)


def call(rows: int = 16, times: int = 1) -> None:
    q = tensor(rows)
    for _ in range(times):
        autoflash.attention(q, q, q, causal=True)


def recorded(file: Path) -> Mapping[str, int | None]:
    for recorder in recording._recorders.values():
        recorder.write()
    return {problem.name: calls for problem, calls in listing.read(file).items()}


def test_calls_of_a_problem_are_counted_however_they_are_spelt(file: Path) -> None:
    call(times=3)
    q = tensor().transpose(1, 2).contiguous()
    autoflash.attention(q, q, q, causal=True, layout="bhsd")
    q = tensor()
    autoflash.attention(q, q, q, window_size=(-1, 0), softmax_scale=0.5, return_lse=True)
    call(rows=8, times=2)
    assert recorded(file) == {NAME: 5, "b1s8h2/2d64c-float32": 2}
    call(times=4)
    assert recorded(file) == {NAME: 9, "b1s8h2/2d64c-float32": 2}


def test_calls_that_are_no_problem_of_ours_are_not_counted(file: Path) -> None:
    call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = tensor(dtype=torch.float64)
        autoflash.attention(q, q, q)  # no template takes it
        q = tensor().requires_grad_()
        autoflash.attention(q, q, q)  # gradients: PyTorch's
    q = tensor(rows=0)
    autoflash.attention(q, q, q)  # nothing to do
    assert recorded(file) == {NAME: 1}


def test_a_kernel_is_counted_as_pytorch_is(file: Path) -> None:
    serving.reset()  # and so the installed templates serve
    call(times=3)
    assert serving.dispatcher("cpu", None).serve(Problem.parse(NAME)).rule == "default"
    assert recorded(file) == {NAME: 3}


def test_a_compiled_model_is_counted_when_it_runs(file: Path) -> None:
    model = torch.compile(
        lambda q: autoflash.attention(q, q, q, causal=True) + 1, backend="aot_eager"
    )
    with torch.no_grad():
        for _ in range(5):
            model(tensor())
    assert recorded(file) == {NAME: 5}


def test_no_call_of_a_thread_is_lost(file: Path) -> None:
    threads = [threading.Thread(target=call, kwargs={"times": 500}) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for recorder in list(recording._recorders.values()):
            recorder.write()  # reading a count and counting are at odds, if ever
    assert recorded(file) == {NAME: 2000}


def test_what_was_counted_stays_when_prepared_calls_are_dropped(file: Path) -> None:
    call(times=3)
    serving.reload()
    call(times=2)
    assert recorded(file) == {NAME: 5}


def test_the_file_is_written_while_the_process_runs(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "PERIOD_S", 0.02)
    call(times=7)
    deadline = time.monotonic() + 30
    while not (file.exists() and f"{NAME} 7\n" in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_the_variable_a_prepared_call_is_what_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTOFLASH_RECORD")
    settings.get.cache_clear()

    def run(*_: Any) -> torch.Tensor:
        return tensor()

    assert recording.counted(run, Problem.parse(NAME)) is run
    call()
    assert not recording._recorders
    assert not file.exists()


def test_a_file_that_cannot_be_written_costs_one_warning_and_no_call(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "in-the-way").write_text("")
    monkeypatch.setenv("AUTOFLASH_RECORD", str(file.parent / "in-the-way" / "ran.txt"))
    settings.get.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(times=3)
        call(rows=8)
        serving.reset()
    said = [str(each.message) for each in told if "AUTOFLASH_RECORD" in str(each.message)]
    assert len(said) == 1
    assert str(file.parent / "in-the-way" / "ran.txt") in said[0]


def test_what_could_not_be_written_is_written_later(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(times=3)
    add = listing.add

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(listing, "add", full)
    for recorder in recording._recorders.values():
        recorder.write()
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        call(rows=8)
    monkeypatch.setattr(listing, "add", add)
    assert recorded(file) == {NAME: 3, "b1s8h2/2d64c-float32": 1}


# Whole processes --------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, os, signal, sys, time
import torch, autoflash
torch.set_num_threads(1)
q = torch.ones(1, 16, 2, 64)
def call(times):
    with torch.inference_mode():
        for _ in range(times):
            autoflash.attention(q, q, q, causal=True)
"""


def start(file: Path, code: str) -> subprocess.Popen[str]:
    empty = file.parent / "no-templates"
    empty.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM + code],
        env={**os.environ, "AUTOFLASH_RECORD": str(file), "AUTOFLASH_TEMPLATES": str(empty)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def test_two_processes_record_into_one_file(tmp_path: Path) -> None:
    file = tmp_path / "ran.txt"
    both = [start(file, "call(300); time.sleep(0.1); call(200)") for _ in range(2)]
    for process in both:
        finish(process)
    assert listing.read(file) == {Problem.parse(NAME): 1000}


@pytest.mark.parametrize(
    "child",
    [
        "multiprocessing.get_context('fork').Process(target=call, args=(20,))",
        "multiprocessing.get_context('fork').Process(target=lambda: None)",
    ],
    ids=["that calls", "that does not"],
)
def test_a_forked_child_counts_its_own_calls_only(tmp_path: Path, child: str) -> None:
    file = tmp_path / "ran.txt"
    finish(start(file, f"call(3); child = {child}; child.start(); child.join(); call(2)"))
    expected = 25 if "args" in child else 5
    assert listing.read(file) == {Problem.parse(NAME): expected}


def test_a_child_that_ends_as_a_program_does_repeats_nothing(tmp_path: Path) -> None:
    file = tmp_path / "ran.txt"
    code = "call(3)\nchild = os.fork()\nif child:\n    os.waitpid(child, 0)\n"
    finish(start(file, code))
    assert listing.read(file) == {Problem.parse(NAME): 3}


def test_a_kill_takes_what_was_not_yet_written_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "ran.txt"
    finish(start(file, "call(100)"))
    killed = start(file, "call(50); print('called', flush=True); time.sleep(60)")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "called\n"
    deadline = time.monotonic() + 60
    while listing.read(file) == {Problem.parse(NAME): 100}:  # the thread adds within PERIOD_S
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.communicate(timeout=60)
    assert listing.read(file) == {Problem.parse(NAME): 150}
