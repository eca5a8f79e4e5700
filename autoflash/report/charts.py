"""Where does everything lie in a chart? Scales and paths; page.html.jinja draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]
_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with the unit.
        low: value at its beginning.
        high: value at its end.
        log: whether equal ratios are equally far apart.
        ticks: values that are written out.
    """

    label: str
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(
        cls, label: str, values: Iterable[float], *, log: bool = False, count: int = 5
    ) -> Axis:
        """An axis that shows all these values, with about so many ticks."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = min(known, default=1.0), max(known, default=1.0)
        if log:
            low, high = (low / 1.12, high * 1.12)
            return cls(label, low, high, True, _log_ticks(low, high, count))
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
        return cls(label, low, high, False, _ticks(low, high, count))

    def share(self, value: float) -> float:
        """How far along the axis a value lies, from 0 to 1; what is beyond lies at the end."""
        if self.log:
            share = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)


def _ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next((s for s in _STEPS if (high - low) / (s * step) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return tuple(i * step for i in range(first, math.floor(high / step + 1e-9) + 1))


def _log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (range(1, 10), _STEPS, (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= count:
            break
    if len(found) > count:
        found = found[:: math.ceil(len(found) / count)]
    # Less than a factor of two lies between: there is no round number in it, or one.
    return tuple(found) if len(found) > 1 else _ticks(low, high, count)


def short(value: float) -> str:
    """A tick as text."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    if value >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.6g}"


@dataclass(frozen=True, slots=True)
class Layer:
    """One path.

    Attributes:
        kind: its class in page.css.
        path: SVG path data.
    """

    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Mark:
    """One dot that says what it is when it is pointed at, or a word beside a line.

    Attributes:
        kind: its class in page.css.
        x: in the chart's units.
        y: likewise.
        text: what it says.
    """

    kind: str
    x: float
    y: float
    text: str


@dataclass(slots=True)
class Chart:
    """A chart: axes, and what has been drawn on them so far.

    Attributes:
        title: above it.
        summary: what it shows in one sentence, for those who do not see it.
        x: horizontal axis.
        y: vertical axis.
        width: units, which are pixels where there is room.
        height: likewise.
    """

    title: str
    summary: str
    x: Axis
    y: Axis
    width: int = 900
    height: int = 320
    layers: list[Layer] = field(default_factory=list)
    dots: list[Mark] = field(default_factory=list)
    words: list[Mark] = field(default_factory=list)

    right = 14
    top = 14

    @property
    def left(self) -> int:
        """Room for the ticks of y and, where it has one, the label."""
        return 58 if self.y.label else 44

    @property
    def bottom(self) -> int:
        """Likewise for x."""
        return 42 if self.x.label else 24

    def place(self, point: Point) -> Point:
        """Units from the upper left corner."""
        across = self.width - self.left - self.right
        down = self.height - self.top - self.bottom
        x = self.left + across * self.x.share(point[0])
        y = self.height - self.bottom - down * self.y.share(point[1])
        return round(x, 1), round(y, 1)

    def line(self, kind: str, points: Sequence[Point]) -> None:
        """Straight from point to point."""
        if points:
            self.layers.append(Layer(kind, "M" + "L".join(_pair(self.place(p)) for p in points)))

    def stairs(self, kind: str, points: Sequence[Point], until: float) -> None:
        """Level from point to point, and on to `until`."""
        if points:
            x, y = self.place(points[0])
            path = f"M{x:g} {y:g}"
            for point in points[1:]:
                x, y = self.place(point)
                path += f"H{x:g}V{y:g}"
            self.layers.append(Layer(kind, f"{path}H{self.place((until, 1))[0]:g}"))

    def scatter(self, kind: str, points: Iterable[Point]) -> None:
        """Dots that say nothing: one path for all, each place once."""
        places = dict.fromkeys(self.place(point) for point in points)
        if places:
            self.layers.append(Layer(kind, "".join(f"M{_pair(each)}h0" for each in places)))

    def dot(self, kind: str, point: Point, text: str) -> None:
        """A dot with a text."""
        self.dots.append(Mark(kind, *self.place(point), text))

    def word(self, kind: str, point: Point, text: str) -> None:
        """A text that stands at a point."""
        self.words.append(Mark(kind, *self.place(point), text))

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """(position, text) of each."""
        return [(self.place((v, 1))[0], short(v)) for v in self.x.ticks]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """(position, text) of each."""
        return [(self.place((1, v))[1], short(v)) for v in self.y.ticks]


def _pair(place: Point) -> str:
    return f"{place[0]:g} {place[1]:g}"
