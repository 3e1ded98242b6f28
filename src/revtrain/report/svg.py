"""Charts as inline SVG: points and lines over two axes.

Colours are CSS variables `--c0` ... `--c7` of the page, so that a chart follows the light or dark scheme. Sizes are in
the units of the view box, about a pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from revtrain.report.tables import clean

WIDTH, HEIGHT = 580, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 554, 14, 282  # of the plotting area
COLOURS, DASHES = 8, ("", "6 3", "2 3")
Box = tuple[float, float, float, float]  # left, top, width, height
MOST_POINTS, MOST_MARKS, MOST_VISIBLE = 400, 60, 45  # of a line; more would only make the page heavy


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`, with its ticks (value, text)."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    @classmethod
    def linear(cls, label: str, values: Iterable[float], within: tuple[float, float] = (-math.inf, math.inf)) -> Axis:
        """An axis that begins and ends with a tick; where all values are equal it does not go beyond `within`."""
        low, high = _range(values)
        if high - low <= 1e-9 * max(1e-3, abs(low), abs(high)):
            reach = abs(low) / 10 if abs(low) > 1e-9 else 1.0
            low, high = max(low - reach, within[0]), min(high + reach, within[1])
        step = _nice((high - low) / 5)
        ticks = tuple(
            (each * step, _text(each * step)) for each in range(math.floor(low / step), math.ceil(high / step) + 1)
        )
        return cls(label, ticks[0][0], ticks[-1][0], ticks)

    @classmethod
    def whole(cls, label: str, values: Iterable[float]) -> Axis:
        """An axis of whole numbers that begins and ends with the values."""
        low, high = _range(values)
        low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
        step = round(max(1.0, _nice((high - low) / 6)))
        ticks = range(-(-low // step) * step, high + 1, step)
        return cls(label, low, high, tuple((each, _text(each)) for each in ticks))

    @classmethod
    def logarithmic(cls, label: str, values: Iterable[float]) -> Axis:
        """An axis with ticks at 1, 2 and 5 times the powers of ten, at the powers alone where there are many.

        Values must be positive.
        """
        low, high = _range(values)
        decades = math.log10(high / low)
        factors = (1, 2, 5) if decades < 4 else (1,)
        step = max(1, math.ceil(decades / 10))
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1 + step, step)
        places = [factor * 10.0**power for power in powers for factor in factors]
        first = max(index for index, place in enumerate(places) if place < low * (1 - 1e-9))
        last = min(index for index, place in enumerate(places) if place > high * (1 + 1e-9))
        ticks = tuple((place, _text(place)) for place in places[first : last + 1])
        return cls(label, ticks[0][0], ticks[-1][0], ticks, log=True)

    @classmethod
    def spanning(cls, label: str, values: Sequence[float], factor: float) -> Axis:
        """Logarithmic where values are positive and more than `factor` apart, else linear."""
        low, high = _range(values)
        return cls.logarithmic(label, values) if 0 < low * factor < high else cls.linear(label, values)

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`; values beyond are put on the edge."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


@dataclass
class Line:
    """A curve through (x, y, what to say of the point)."""

    name: str
    points: list[tuple[float, float, str]]
    style: int = 0  # its colour and, from the ninth on, its dashes
    faint: bool = False


@dataclass
class Point:
    """A mark with a short name beside it; `spread` is half the height of its error bar."""

    x: float
    y: float
    name: str
    tooltip: str
    colour: int = 0
    spread: float | None = None
    hollow: bool = False
    ring: bool = False


@dataclass
class Chart:
    """One drawing. Marks and lines are added, then `svg()` is the element."""

    title: str
    x: Axis
    y: Axis
    _parts: list[str] = field(default_factory=list)

    def line(self, line: Line) -> None:
        points = _thinned(line.points, MOST_POINTS)
        if not points:
            return
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y, _ in points)
        dash = DASHES[line.style // COLOURS % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        faint = " faint" if line.faint else ""
        self._parts.append(
            f'<g class="s{line.style % COLOURS}{faint}"><polyline class="line" points="{path}"{style}>'
            f"<title>{_escaped(line.name)}</title></polyline>"
        )
        shown = "dot" if len(points) <= MOST_VISIBLE else "dot unseen"
        radius = 1.5 if line.faint else 2.2
        for x, y, tooltip in _thinned(points, MOST_MARKS):
            self._parts.append(
                f'<circle class="{shown}" cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="{radius}">'
                f"<title>{_escaped(tooltip)}</title></circle>"
            )
        self._parts.append("</g>")

    def staircase(self, points: Sequence[tuple[float, float]], tooltip: str) -> None:
        """The border of what lies below and to the right of `points`, which are ordered by x."""
        if points:
            path = f"M{self._x(points[0][0]):.1f},{self._y(points[0][1]):.1f}"
            path += "".join(f"H{self._x(x):.1f}V{self._y(y):.1f}" for x, y in points[1:])
            self._parts.append(f'<path class="front" d="{path}H{RIGHT}"><title>{_escaped(tooltip)}</title></path>')

    def points(self, points: Sequence[Point]) -> None:
        """Marks in front of the error bars, names in front of the marks."""
        places = [(self._x(point.x), self._y(point.y)) for point in points]
        taken = [(x - 7, y - 7, 14.0, 14.0) for x, y in places]
        bars, marks, names = [], [], []
        for point, (x, y) in zip(points, places, strict=True):
            colour = f'class="s{point.colour % COLOURS}"'
            if point.spread:
                low, high = self._y(point.y - point.spread), self._y(point.y + point.spread)
                path = f"M{x:.1f},{low:.1f}V{high:.1f}M{x - 3:.1f},{low:.1f}h6M{x - 3:.1f},{high:.1f}h6"
                bars.append(f'<g {colour}><path class="bar" d="{path}"/></g>')
            ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>' if point.ring else ""
            hollow = " hollow" if point.hollow else ""
            marks.append(
                f'<g {colour}>{ring}<circle class="mark{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
                f"<title>{_escaped(point.tooltip)}</title></circle></g>"
            )
            left, top, _, _ = box = self._beside(x, y, point.name, taken)
            taken.append(box)
            names.append(f'<text class="label" x="{left:.1f}" y="{top + 10:.1f}">{_escaped(point.name)}</text>')
        self._parts += [*bars, *marks, *names]

    def svg(self) -> str:
        grid = [
            f'<path class="grid" d="M{LEFT},{self._y(value):.1f}H{RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{self._y(value) + 4:.1f}" text-anchor="end">{_escaped(text)}</text>'
            for value, text in self.y.ticks
        ]
        grid += [
            f'<path class="grid" d="M{self._x(value):.1f},{TOP}V{BOTTOM}"/>'
            f'<text class="tick" x="{self._x(value):.1f}" y="{BOTTOM + 17}" text-anchor="middle">'
            f"{_escaped(text)}</text>"
            for value, text in self.x.ticks
        ]
        middle = (TOP + BOTTOM) / 2
        return "\n".join(
            [
                f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escaped(self.title)}">',
                *grid,
                f'<path class="frame" d="M{LEFT},{TOP}V{BOTTOM}H{RIGHT}"/>',
                f'<text class="name" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">'
                f"{_escaped(self.x.label)}</text>",
                f'<text class="name" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
                f"{_escaped(self.y.label)}</text>",
                *self._parts,
                "</svg>",
            ]
        )

    def _x(self, value: float) -> float:
        return LEFT + self.x.place(value) * (RIGHT - LEFT)

    def _y(self, value: float) -> float:
        return BOTTOM - self.y.place(value) * (BOTTOM - TOP)

    def _beside(self, x: float, y: float, name: str, taken: Sequence[Box]) -> Box:
        """Where the name of a mark covers least of what is `taken`; near the mark if possible."""
        width, height = 7.5 * len(name), 12.0

        def box(angle: int, reach: float) -> Box:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            return x + dx * reach + (dx - 1) / 2 * width, y + dy * reach - height / 2, width, height

        def cost(box: Box) -> float:
            outside = box[0] < LEFT or box[0] + width > RIGHT + 8 or box[1] < 0 or box[1] + height > BOTTOM
            return 1e6 * outside + sum(_overlap(box, other) for other in taken)

        boxes = [box(angle, reach) for reach in (11, 18, 26) for angle in (0, -45, 45, -90, 90, 180, -135, 135)]
        return min(boxes, key=cost)


def key(name: str, style: int, kind: str = "line", faint: bool = False) -> str:
    """An entry of a legend, as HTML: `kind` is line, mark, hollow or front."""
    dash = DASHES[style // COLOURS % len(DASHES)]
    drawn = {
        "line": f'<path class="line" d="M1,6H25" stroke-dasharray="{dash}"/>',
        "mark": '<circle class="mark" cx="13" cy="6" r="5"/>',
        "hollow": '<circle class="mark hollow" cx="13" cy="6" r="5"/>',
        "front": '<path class="front" d="M1,6H25"/>',
    }[kind]
    shade = " faint" if faint else ""
    return (
        f'<span class="key"><svg viewBox="0 0 26 12"><g class="s{style % COLOURS}{shade}">{drawn}</g></svg>'
        f"{_escaped(name)}</span>"
    )


def _escaped(text: str) -> str:
    return escape(clean(text, 300))


def _range(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return (min(values), max(values)) if values else (0.0, 1.0)


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _text(value: float) -> str:
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e7 or value == 0 else f"{value:.0e}"


def _thinned(points: list[tuple[float, float, str]], most: int) -> list[tuple[float, float, str]]:
    """Every so many of the points, and the last."""
    if len(points) <= most:
        return points
    every = math.ceil((len(points) - 1) / (most - 1))
    return points[:-1:every] + points[-1:]


def _overlap(one: Box, other: Box) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
