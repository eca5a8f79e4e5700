"""Crew: tunes several problems at once, each on one of several devices of a kind.

A thread for each device takes the next problem, and all its trials and finals are run there: two
boards of a kind do not run at one speed, and candidates that are worth comparing differ by little.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from autoflash.errors import AutoflashError, DatabaseError, WorkerError
from autoflash.tuning.compilers import TICK_S, Compilers, Lane
from autoflash.tuning.pool import Workers
from autoflash.tuning.progress import Event, Listener, TuneResult
from autoflash.tuning.run import Run

STOP_S = 1.5
"""How long a run that ends waits for its threads: one that a driver holds is left behind."""


class Tuning(Protocol):
    """Tunes problems on one device, one after the other."""

    run: Run

    def greet(self) -> None:
        """Start the worker and see that the device works, or raise WorkerError."""

    def begin(self, command: str) -> int:
        """Note the run in the database; its number."""

    def tune(self, index: int) -> TuneResult:
        """Tune the problem of that place."""

    def interrupted(self, index: int) -> TuneResult:
        """What there is of a problem that was not finished."""

    def close(self) -> None:
        """End the worker; called by the thread that used it."""

    def lost(self, index: int, message: str) -> None:
        """Tell that the device has failed while it had that problem."""


MakeTuning = Callable[[Run, Listener], Tuning]


@dataclass(slots=True, eq=False)
class _Member:
    label: str
    lane: Lane
    tuning: Tuning
    index: int | None = None  # of the problem under way
    greeted: bool = False
    ended: bool = False


class Crew:
    """Several devices at work on one list of problems.

    A device that fails leaves its problem to the others, which go on from the trials that are
    stored.
    """

    def __init__(
        self,
        run: Run,
        runners: Mapping[str, Workers],
        make: MakeTuning,
        *,
        problems: int,
        on_event: Listener,
    ) -> None:
        """Get ready; nothing is started.

        Args:
            run: what all devices share; its workers compile.
            runners: label of a device -> what runs candidates there.
            make: of a device's own run and its listener, what tunes there.
            problems: how many there are.
            on_event: told of everything, from the thread that calls `run_all`.
        """
        self._run = run
        self._tell = on_event
        self._stopped = threading.Event()
        self._changed = threading.Condition()  # guards what follows, and the members
        self._todo = deque(range(problems))
        self._results: dict[int, TuneResult] = {}
        self._number: int | None = None
        self._error: BaseException | None = None
        self._failure: WorkerError | None = None  # of the device that failed last
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._compilers = Compilers(run.workers, run.jobs, run.compiled)
        share = math.ceil(run.jobs / len(runners))
        self._members = []
        for label, runner in runners.items():
            lane = Lane(runner, self._compilers, self._stopped)
            own = dataclasses.replace(run, workers=lane, jobs=share)
            self._members.append(_Member(label, lane, make(own, self._listener(label))))

    def run_all(self, command: str) -> list[TuneResult]:
        """Tune every problem.

        Args:
            command: what to note as the cause of the run.

        Returns:
            One result per problem, in order.

        Raises:
            WorkerError: every device has failed.
        """
        count = len(self._todo)
        status = "failed"
        threads = [
            threading.Thread(target=self._work, args=(member, command), daemon=True)
            for member in self._members
        ]
        try:
            for thread in threads:
                thread.start()
            while not all(member.ended for member in self._members):
                self._deliver(0.0 if self._compilers.serve(TICK_S) else TICK_S)
                if self._error is not None:
                    break
            self._deliver(0.0)
            if self._error is not None:
                raise self._error
            if self._failure is not None and self._todo:
                raise self._failure
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            self._stop(threads)
            if self._number is not None:
                with suppress(DatabaseError):  # a run without this note is taken for a killed one
                    self._run.database.finish_run(self._number, status)
        if self._error is not None:
            raise self._error
        return [self._result(index) for index in range(count)]

    # In the thread of a device ------------------------------------------------------------------

    def _work(self, member: _Member, command: str) -> None:
        try:
            while (index := self._take(member)) is not None:
                try:
                    self._begin(member, command)
                    result = member.tuning.tune(index)
                    if result.status == "partial":
                        member.tuning.greet()  # or a device that fails in the finals takes another
                except WorkerError as error:
                    self._lose(member, index, error)
                    return
                with self._changed:
                    self._results[index] = result
                    member.index = None
                    self._changed.notify_all()
        except KeyboardInterrupt:
            pass  # from the lane: the run ends
        except BaseException as error:
            self._error = self._error or error
        finally:
            try:
                member.tuning.close()
            except AutoflashError as error:
                self._error = self._error or error
            member.ended = True

    def _take(self, member: _Member) -> int | None:
        """The next problem; None when all are finished, since until then one may come back."""
        with self._changed:
            while not self._stopped.is_set():
                if self._todo:
                    member.index = self._todo.popleft()
                    return member.index
                if all(each.index is None for each in self._members):
                    return None
                self._changed.wait(4 * TICK_S)
        return None

    def _begin(self, member: _Member, command: str) -> None:
        if member.greeted:
            return
        member.tuning.greet()
        member.greeted = True
        with self._changed:
            if self._number is None:
                self._number = member.tuning.begin(command)
            member.tuning.run.number = self._number

    def _lose(self, member: _Member, index: int, error: WorkerError) -> None:
        with self._changed:
            self._todo.appendleft(index)
            member.index = None
            self._failure = error
            self._changed.notify_all()
        member.tuning.lost(index, f"device {member.label} is used no more: {error}")

    def _listener(self, label: str) -> Listener:
        return lambda event: self._events.put(dataclasses.replace(event, device=label))

    # In the thread of the caller ----------------------------------------------------------------

    def _deliver(self, timeout_s: float) -> None:
        """Tell the listener what happened, waiting at most so long for something to."""
        try:
            if timeout_s:
                self._tell(self._events.get(timeout=timeout_s))
            while True:
                self._tell(self._events.get_nowait())
        except queue.Empty:
            return

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        self._stopped.set()
        limit = time.monotonic() + STOP_S
        self._compilers.close()
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, limit - time.monotonic()))

    def _result(self, index: int) -> TuneResult:
        if (result := self._results.get(index)) is not None:
            return result
        owner = next((m for m in self._members if m.index == index), self._members[0])
        return owner.tuning.interrupted(index)
