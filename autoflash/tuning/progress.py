"""Progress: what a tuning run tells while it goes on, and what it comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from autoflash.problem import Problem
from autoflash.record import Record

STATUSES = {
    "improved": "a config beats the default by more than the noise",
    "unimproved": "nothing beats the default by more than the noise, so that the default is best",
    "predicted": "the device is absent; configs were compiled and ranked by the static model",
    "partial": "interrupted or out of time before a winner was confirmed",
    "invalid": "no config works, or no template accepts the problem",
}
"""Every status a result can have, with its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """What tuning one problem came to.

    Attributes:
        problem: which.
        status: a key of STATUSES.
        best: the winner, stored in the database unless the status is "partial".
        outcomes: outcome -> number of trials, those of earlier runs included; "infeasible" counts
            the points of the spaces that a constraint rejects.
        trials: configs with a record, those of earlier runs included.
        elapsed_s: time spent in this run.
        reason: for "partial" and "invalid", why; else what else there is to say, or "".
    """

    problem: Problem
    status: str
    best: Record | None
    outcomes: Counter[str] = field(default_factory=Counter)
    trials: int = 0
    elapsed_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened; `tune` calls on_event with it, from the thread that called `tune`.

    Attributes:
        kind: "start" (of a problem), "trial" (one more record, or word of what goes on before it),
            "finalist" (one more config timed in the finals), "done" (with a problem), "lost" (the
            device has failed; another takes the problem).
        problem: which is being tuned.
        index: its place among the problems, from 0.
        total_problems: how many there are.
        done: trials of this problem so far, those of earlier runs included.
        total: how many trials it may have.
        record: the trial or winner, where the event is about one.
        best_us: the best time so far.
        message: for people.
        device: which of several devices is at work, by its number; "" where there is one.
    """

    kind: str
    problem: Problem
    index: int
    total_problems: int
    done: int = 0
    total: int = 0
    record: Record | None = None
    best_us: float | None = None
    message: str = ""
    device: str = ""


Listener = Callable[[Event], None]
