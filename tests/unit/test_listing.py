"""Files of problems with their calls: read, added to, shared and interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autoflash.errors import InvalidInput
from autoflash.problem import Problem
from autoflash.workload import listing

NAME = "b1s64h2/2d64c-float32"
OTHER = "b1s8h2/2d64f-float32"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ran.txt"


def test_counts_of_one_problem_add_up(file: Path) -> None:
    file.write_text(f"{NAME} 3\n\n# {OTHER} 9\nb1s64h2d64c-float32 4  # by another name\n{OTHER}\n")
    assert listing.read(file) == {Problem.parse(NAME): 7, Problem.parse(OTHER): 1}


def test_without_any_count_nothing_is_said_of_calls(file: Path) -> None:
    file.write_text(f"{NAME}\n{OTHER}\n")
    assert listing.read(file) == {Problem.parse(NAME): None, Problem.parse(OTHER): None}


def test_many_wrong_lines_are_counted_and_the_file_is_left_alone(file: Path) -> None:
    text = f"{NAME}\n" + "nonsense\n" * 30
    file.write_text(text)
    with pytest.raises(InvalidInput) as raised:
        listing.read(file)
    told = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in told[:10]] == [f"{file}:{n}" for n in range(2, 12)]
    assert told[10] == "and 20 more"
    assert "these 30 lines" in told[11]
    assert file.read_text() == text


def test_what_is_added_can_be_read(file: Path) -> None:
    listing.add(file, {NAME: 2, OTHER: 1})
    listing.add(file, {OTHER: 5})
    assert listing.read(file) == {Problem.parse(NAME): 2, Problem.parse(OTHER): 6}


def test_only_counted_lines_change(file: Path) -> None:
    before = f"# mine\n\n{NAME}   3 # why\nno problem at all 7\n{NAME} 1\n{OTHER} many\n\xff end"
    file.write_bytes(before.encode("latin-1"))
    file.chmod(0o640)
    listing.add(file, {NAME: 4, OTHER: 2})
    after = before.replace(f"{NAME}   3 # why", f"{NAME} 7  # why") + f"\n{OTHER} 2\n"
    assert file.read_bytes() == after.encode("latin-1")
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    file.symlink_to(tmp_path / "elsewhere.txt")
    listing.add(file, {NAME: 1})
    assert file.is_symlink()
    assert listing.read(tmp_path / "elsewhere.txt") == {Problem.parse(NAME): 1}


@pytest.mark.parametrize("content", [b"#!/bin/sh\necho hello\n", b"\x7fELF\0\0", b"\0" * 100])
def test_another_file_is_not_touched(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match="names no problem, so it is taken for some other file"):
        listing.add(file, {NAME: 1})
    assert file.read_bytes() == content


def test_what_is_no_file_is_not_replaced() -> None:
    with pytest.raises(InvalidInput, match="/dev/null is no regular file"):
        listing.add(Path("/dev/null"), {NAME: 1})


ADD = """
import os, signal, sys
from pathlib import Path
from autoflash.workload import listing
path, name, count, dies = sys.argv[1:]
if dies == "before the rename":
    os.replace = os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if dies == "half written":
    os.fsync = lambda file: (os.ftruncate(file, 30), os.kill(os.getpid(), signal.SIGKILL))
for number in range(int(count)):
    listing.add(Path(path), {name: 1})
    print(number, flush=True)
"""


def start(file: Path, name: str, count: int, dies: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ADD, str(file), name, str(count), dies],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("dies", ["half written", "before the rename"])
def test_a_kill_in_the_middle_of_a_write_loses_nothing_that_was_there(
    file: Path, dies: str
) -> None:
    listing.add(file, {OTHER: 41, NAME: 1})
    before = file.read_bytes()
    writer = start(file, NAME, 1, dies)
    out, _ = writer.communicate(timeout=60)
    assert writer.returncode == -signal.SIGKILL
    assert out == ""
    assert file.read_bytes() == before
    listing.add(file, {NAME: 1})  # nobody holds the lock, and nothing half done is in the way
    assert listing.read(file) == {Problem.parse(OTHER): 41, Problem.parse(NAME): 2}
    assert {path.name for path in file.parent.iterdir()} == {"ran.txt", "ran.txt.lock"}


def test_a_kill_at_any_time_loses_nothing_that_was_added(file: Path) -> None:
    listing.add(file, {OTHER: 41})
    for _ in range(3):
        known = listing.read(file).get(Problem.parse(NAME)) or 0
        writer = start(file, NAME, 100_000)
        assert writer.stdout is not None
        done = 0
        for _ in range(20):
            done += bool(writer.stdout.readline())
        writer.kill()
        done += len(writer.stdout.readlines())
        writer.wait(timeout=60)
        calls = listing.read(file)
        assert calls[Problem.parse(OTHER)] == 41
        # One more may be in the file than was said to be.
        assert calls[Problem.parse(NAME)] in (known + done, known + done + 1)


def test_processes_add_to_one_file(file: Path) -> None:
    writers = [start(file, name, 50) for name in (NAME, NAME, OTHER)]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    assert listing.read(file) == {Problem.parse(NAME): 100, Problem.parse(OTHER): 50}
