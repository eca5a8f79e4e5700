"""Listing: a text file of problems, one name to a line, and how often each was asked for.

    # comments and empty lines are skipped
    b4s4096h32/8d128c-bfloat16 1024
    b8s1x8192h32/8d128c-bfloat16

A line without a count is one call; lines of one problem add up. People write such files, and
`attention()` does (runtime/recording.py), several processes at once into the same one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from autoflash.errors import InvalidInput
from autoflash.problem import Problem

LOCK_TIMEOUT_S = 10.0
"""Longest wait for another process that adds to the file, which takes milliseconds."""
_MOST_TOLD = 10
"""Wrong lines that an error lists; it counts them all."""
_PROBE_BYTES = 1 << 16
"""What is looked at to tell a listing from another file."""
_HEAD = b"# Problems that autoflash.attention() was asked for, and how often.\n"


def read(path: Path, dtype: str = "bfloat16") -> dict[Problem, int | None]:
    """The problems of a file with their calls; None for all where no line has a count.

    Args:
        path: the file; it is only read.
        dtype: of names that give none.

    Raises:
        InvalidInput: the file cannot be read, names no problem, or has wrong lines: the message
            gives place and mistake of each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as a list of problems: {error}") from error
    found: dict[Problem, int] = {}
    wrong: list[str] = []
    counted = False
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            problem, calls = _parse(words, dtype)
        except InvalidInput as error:
            wrong.append(f"{path}:{number}: {error}")
            continue
        counted = counted or len(words) > 1
        found[problem] = found.get(problem, 0) + calls
    if wrong:
        more = len(wrong) - _MOST_TOLD
        told = [*wrong[:_MOST_TOLD], *([f"and {more} more"] if more > 0 else [])]
        raise InvalidInput(
            "\n".join(told) + f"\nNothing was done, and {path} is as it was: correct or delete "
            f"{'this line' if len(wrong) == 1 else f'these {len(wrong)} lines'}, or put # before."
        )
    if not found:
        raise InvalidInput(
            f"{path} names no problem; give one per line, such as b4s4096h32/8d128c."
        )
    return dict(found) if counted else dict.fromkeys(found)


def add(path: Path, calls: Mapping[str, int]) -> None:
    """Add to the counts of a file, which is made if it does not exist.

    Whoever reads it, and whatever is killed when, the file is the old one or the new one: it is
    written beside the old one and renamed. Lines that this did not count (comments, wrong ones,
    problems under another spelling) stay as they are, and where they are.

    Args:
        path: the file; `<path>.lock` beside it keeps processes apart, `<path>.new` is the next one.
        calls: problem name -> how many more.

    Raises:
        OSError: the file cannot be read or written; filelock.Timeout, which is one, if another
            process holds the lock for LOCK_TIMEOUT_S.
        InvalidInput: it is no list of problems.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():  # /dev/null must not be replaced either
        raise InvalidInput(f"{path} is no regular file.")
    with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S):
        old = path.read_bytes() if path.exists() else b""
        _check(path, old[:_PROBE_BYTES])
        new = path.with_name(f"{path.name}.new")
        with new.open("wb") as file:
            file.writelines(_added(old, {name.encode(): n for name, n in calls.items()}))
            file.flush()
            os.fsync(file.fileno())
        if old:
            new.chmod(path.stat().st_mode & 0o7777)
        new.replace(path)


def _added(old: bytes, calls: dict[bytes, int]) -> Iterator[bytes]:
    """The lines of a file in which some counts have grown."""
    if not old:
        yield _HEAD
    for line in old.splitlines(keepends=True):
        told, mark, comment = line.partition(b"#")
        name, count, *others = [*told.split(), b"", b""][:3]
        if name in calls and (count or b"1").isdigit() and not any(others):
            total = int(count or 1) + calls.pop(name)
            line = b"%s %d" % (name, total) + (b"  #" + comment if mark else b"\n")
        yield line if line.endswith(b"\n") else line + b"\n"
    for name, more in calls.items():
        yield b"%s %d\n" % (name, more)


def _parse(words: list[str], dtype: str) -> tuple[Problem, int]:
    if len(words) > 2:
        raise InvalidInput(
            f"{' '.join(words)!r} has {len(words)} words; a problem's name and perhaps its number "
            "of calls are meant."
        )
    problem = Problem.parse(words[0], dtype)
    if len(words) == 1:
        return problem, 1
    if not (words[1].isascii() and words[1].isdecimal()) or int(words[1]) < 1:
        raise InvalidInput(f"the number of calls {words[1]!r} is not a whole number from 1 up.")
    return problem, int(words[1])


def _check(path: Path, start: bytes) -> None:
    """Refuse to add to what is no list of problems: some other file, named by mistake."""
    lines = [line.partition(b"#")[0].split() for line in start.splitlines()]
    named = [words for words in lines if words]
    for words in named:
        try:
            Problem.parse(words[0].decode("ascii"))
            return
        except (InvalidInput, UnicodeDecodeError):
            continue
    if named or b"\0" in start:
        raise InvalidInput(f"{path} names no problem, so it is taken for some other file.")
