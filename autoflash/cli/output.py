"""How the commands speak: tables and JSON on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from autoflash.benchmark import Row
    from autoflash.config import Config
    from autoflash.problem import Problem
    from autoflash.record import Record
    from autoflash.tuning.progress import Event

_QUIET_S = 5.0
"""Longest silence of plain progress lines while trials go by."""


def say(text: str = "") -> None:
    """A line of the answer."""
    print(text)


def remark(text: str) -> None:
    """A line beside the answer: progress, a hint, a warning."""
    print(text, file=sys.stderr, flush=True)


def write_json(value: Any) -> None:
    """The answer as JSON."""
    print(json.dumps(value, indent=1))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The answer as a table of aligned text, with bold headings on a terminal.

    Where a terminal is too narrow, the last column, which is the long one (a config, a reason),
    goes below the others.

    Args:
        title: printed above.
        columns: headings; one that starts with ">" is aligned right.
        rows: cells; None is an empty one.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    heads = [column.removeprefix(">") for column in columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]

    def line(row: Sequence[str], last: int) -> str:
        padded = [
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(row[:last], widths, columns, strict=False)
        ]
        return "  ".join(padded).rstrip()

    console = Console()
    folded = console.is_terminal and sum(widths) + 2 * len(widths) - 2 > console.width
    last = len(columns) - 1 if folded else len(columns)
    bold = "bold" if console.is_terminal else None
    for text in (title, line(heads, last)):
        console.print(text, style=bold, markup=False, highlight=False, soft_wrap=True)
    say("  ".join("-" * width for width in widths[:last]))
    for row in cells:
        say(line(row, last))
        if folded and row[-1]:
            say(f"    {row[-1]}")


def us(latency_us: float | None) -> str:
    """A time in microseconds with three or more significant digits."""
    return "" if latency_us is None else _significant(latency_us)


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def ratio(reference_us: float | None, latency_us: float | None) -> str:
    """How many times faster than a reference; empty where either is unknown."""
    return f"{reference_us / latency_us:.2f}x" if reference_us and latency_us else ""


def versus_torch(record: Record) -> str:
    """Speed-up over PyTorch's best, which is named."""
    speedup = ratio(record.torch_us, record.latency_us)
    return f"{speedup} {record.torch_provider or ''}".rstrip()


def duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def tflops(record: Record) -> str:
    """The rate of a record."""
    return _significant(record.problem.tflops(record.latency_us)) if record.latency_us else ""


def kernel(config: Config | None) -> str:
    """What serves: a template with its config, or PyTorch."""
    return f"{config.template} ({config})" if config else "PyTorch"


def shortened(configs: Sequence[Config | None]) -> tuple[list[str], list[str]]:
    """The configs of a column, without the values that all those of a template share.

    Returns:
        A text for each config, and a line for each template with what was left out.
    """
    distinct: dict[str, set[Config]] = {}
    for config in filter(None, configs):
        distinct.setdefault(config.template, set()).add(config)
    shared = {
        template: set.intersection(*(set(config.items()) for config in same))
        for template, same in distinct.items()
        if len(same) > 1
    }
    texts = [
        " ".join(f"{k}={v}" for k, v in c.items() if (k, v) not in shared.get(c.template, ()))
        if c
        else ""
        for c in configs
    ]
    notes = [
        f"{template}, all of them: {' '.join(f'{k}={v}' for k, v in sorted(values))}"
        for template, values in shared.items()
        if values
    ]
    return texts, notes


def kib(count: int | None) -> str:
    """Bytes as KiB."""
    return "" if count is None else f"{count / 1024:.0f} KiB"


def bench_builds(count: int) -> None:
    """What a comparison needs is being built."""
    remark(f"building ahead: {count} {'kernel' if count == 1 else 'kernels'}")


def bench_started(problem: Problem, index: int, total: int) -> None:
    """A comparison begins."""
    remark(f"[{index + 1}/{total}] {problem.name}")


def bench_row(row: Row) -> None:
    """A provider was timed, or failed; those that are not here are listed once, at the end."""
    if row.latency_us is not None:
        remark(f"  {row.provider}: {us(row.latency_us)} us")
    elif row.outcome != "unavailable":
        remark(f"  {row.provider}: {row.outcome}: {row.reason}")


class TuneProgress(AbstractContextManager["TuneProgress"]):
    """Shows the events of a tuning run: bars on a terminal, plain lines elsewhere.

    Call it with each Event.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Bars | None = None
        self._said, self._said_s = "", 0.0
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeElapsedColumn as Elapsed

            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"), Elapsed(), console=console,
            )  # fmt: skip
            # device -> its bar; the only device of a run has no name
            self._tasks = {"": self._bars.add_task("starting", total=None, note="")}

    def __enter__(self) -> TuneProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._quiet:
            return
        where = f"[{event.index + 1}/{event.total_problems}] {event.problem.name}"
        if event.device:
            where += f" on device {event.device}"
        best = f"best {us(event.best_us)} us" if event.best_us is not None else ""
        if event.kind == "lost" and self._bars and event.device in self._tasks:
            self._bars.remove_task(self._tasks.pop(event.device))
        if event.kind in ("done", "lost"):
            self._line(f"{where}: {', '.join(part for part in (best, event.message) if part)}")
        elif self._bars:
            note = "  ".join(part for part in (best, event.message) if part)
            task = self._task(self._bars, event.device)
            self._bars.update(
                task, description=escape(where), completed=event.done,
                total=event.total or None, note=escape(note),
            )  # fmt: skip
        elif event.kind != "trial" or time.monotonic() - self._said_s > _QUIET_S:
            count = f"{event.done}/{event.total}" if event.total else f"{event.done}"
            parts = (event.kind, count, best, event.message)
            self._line(f"{where}: {', '.join(part for part in parts if part)}")

    def _task(self, bars: Bars, device: str) -> TaskID:
        """The bar of a device, the first of which takes that of a run which is starting."""
        if device not in self._tasks:
            start = self._tasks.pop("", None)
            self._tasks[device] = (
                bars.add_task("starting", total=None, note="") if start is None else start
            )
        return self._tasks[device]

    def _line(self, text: str) -> None:
        if text == self._said:  # the next finalist, and nothing new about it
            return
        self._said, self._said_s = text, time.monotonic()
        if self._bars:
            self._bars.console.print(escape(text), highlight=False)
        else:
            remark(text)
