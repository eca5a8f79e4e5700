"""Recording: which problems did this process serve, and how often? AUTOFLASH_RECORD says where to.

Without that variable nothing here is in the way of a call. With it, every prepared call counts: one
atomic step, no lock, no file. A thread adds the counts to the file every PERIOD_S seconds, and the
end of the process adds the rest, so that what ends it without notice (SIGKILL, os._exit, a crash)
loses at most the calls since the last time, and never anything that is in the file.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping
from multiprocessing import util
from pathlib import Path
from typing import Any

from autoflash import settings
from autoflash.errors import InvalidInput
from autoflash.problem import Problem
from autoflash.runtime import warn
from autoflash.runtime.prepare import Result, Run
from autoflash.workload import listing

PERIOD_S = 2.0
"""Between two additions to the file."""
_SHARE = 50
"""An addition may take a 50th of the time: of a long file they are made less often."""


class Tally:
    """The calls of one problem, counted by the prepared calls that hold it."""

    __slots__ = ("__weakref__", "_left", "_name", "_taken", "tick")

    def __init__(self, name: str, left: deque[tuple[str, int]]) -> None:
        # A step of this is atomic. Reading it is one more step, which _taken leaves out.
        self.tick = itertools.count().__next__
        self._taken = 0
        self._name = name
        self._left = left

    def take(self) -> tuple[str, int]:
        """The problem's name, and its calls since the last time; not for two threads at once."""
        steps = self.tick()
        calls, self._taken = steps - self._taken, steps + 1
        return self._name, calls

    def __del__(self) -> None:
        # Its last prepared call was dropped. A deque, because any thread may be here at any time.
        self._left.append(self.take())


class Recorder:
    """Counts the calls of this process, and adds them to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = os.getpid()
        self._tallies: weakref.WeakValueDictionary[Problem, Tally] = weakref.WeakValueDictionary()
        self._left: deque[tuple[str, int]] = deque()
        self._unwritten: Counter[str] = Counter()
        self._trouble: str | None = None
        self._told = False
        self._making = threading.Lock()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def tally(self, problem: Problem) -> Tally:
        """Where the calls of a problem are counted."""
        with self._making:
            if self._thread is None:
                self._start()
            found = self._tallies.get(problem)
            if found is None:
                found = self._tallies[problem] = Tally(problem.name, self._left)
        self._tell()
        return found

    def write(self) -> None:
        """Add to the file what is not there yet; what goes wrong is kept for `_tell`."""
        if os.getpid() != self._process:  # a forked child that ends: these calls are its parent's
            return
        with self._writing:
            with self._making:
                tallies = list(self._tallies.values())
            self._unwritten.update(dict([tally.take() for tally in tallies]))
            del tallies  # the last to hold one, maybe, which then goes into _left
            while self._left:
                name, calls = self._left.popleft()
                self._unwritten[name] += calls
            self._unwritten = +self._unwritten
            if self._unwritten and self._add(self._unwritten):
                self._unwritten.clear()

    def close(self) -> None:
        """Write for the last time: the process ends."""
        self._stop.set()
        self.write()
        if self._unwritten:
            self._tell()

    def _start(self) -> None:
        self._add({})  # whoever misspelt the file is told now, not after hours
        self._thread = threading.Thread(target=self._run, name="autoflash-record", daemon=True)
        with contextlib.suppress(RuntimeError):  # the interpreter is ending
            self._thread.start()
        atexit.register(self.close)
        # Children of multiprocessing end without atexit, but not without this.
        util.Finalize(None, self.close, exitpriority=0)

    def _run(self) -> None:
        pause = PERIOD_S
        while not self._stop.wait(pause):
            started = time.monotonic()
            self.write()
            pause = max(PERIOD_S, _SHARE * (time.monotonic() - started))

    def _add(self, calls: Mapping[str, int]) -> bool:
        try:
            listing.add(self.path, calls)
        except (OSError, InvalidInput) as error:
            self._trouble = (
                f"AUTOFLASH_RECORD: calls cannot be added to {self.path} ({error}). They are "
                "served all the same; their counts are kept in memory, and tried again."
            )
            return False
        return True

    def _tell(self) -> None:
        """Warn of what went wrong, once."""
        if self._trouble is not None and not self._told:
            self._told = True
            warn.once(self._trouble)


_recorders: dict[Path, Recorder] = {}
"""At most one: the settings of a process do not change, but for tests."""


def counted(run: Run, problem: Problem) -> Run:
    """A call that was made once and may be made again: with each counted, if this process records.

    Otherwise it is `run` itself.
    """
    path = settings.get().record_file
    if path is None:
        return run
    recorder = _recorders.get(path) or _recorders.setdefault(path, Recorder(path))
    tally = recorder.tally(problem)
    tally.tick()

    def run_counted(*arguments: Any) -> Result:
        tally.tick()
        return run(*arguments)

    return run_counted


def after_fork() -> bool:
    """Leave to the parent what it counted; returns whether prepared calls hold tallies of it."""
    recording = bool(_recorders)
    _recorders.clear()
    return recording


def reset() -> None:
    """Write what there is and start anew: for tests."""
    for recorder in _recorders.values():
        recorder.close()
    _recorders.clear()
