"""What is a table before it is laid out, on a page or in a terminal?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows.

    Attributes:
        title: printed above.
        columns: headings; one that starts with ">" is aligned right. The first names its row.
        rows: cells; "" is one of which nothing is known.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def figure(value: float | None) -> str:
    """A number with three significant digits or more; "" where it is not known."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.3g}"


def times(reference: float | None, latency_us: float | None) -> str:
    """How many times faster than a reference; "" where either is unknown."""
    return f"{reference / latency_us:.2f}x" if reference and latency_us else ""


def span(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
