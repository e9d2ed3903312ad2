"""Charts as SVG: axes, lines, points and intervals, in colors that the page's style sheet names.

Series are the classes ``s0`` to ``s5``, the baseline is ``base``; lengths are those of the ``viewBox``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1000, 440
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 48
SHAPES = ("square", "triangle", "diamond", "down", "circle", "cross")


@dataclass(frozen=True)
class Axis:
    """A scale from values to places; values outside of it are put on its end.

    Args:
        low: The smallest value.
        high: The largest.
        log: Whether equal ratios have equal lengths.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], log: bool = False, pad: float = 0.05) -> Axis:
        """The axis of values, with a share of its length left free at both ends."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(finite), max(finite)) if finite else (1.0, 2.0)
        if log:
            room = max((high / low) ** pad, 1.02)
            return cls(low / room, high * room, log)
        room = (high - low) * pad or abs(high) * pad or 1.0
        return cls(low - room, high + room)

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return min((value - low) / (high - low), 1.0)

    def ticks(self) -> list[float]:
        """Some round values."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                found = [step * 10.0**power for power in powers for step in steps]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if len(found) >= 4:
                    return found
        rough = (self.high - self.low) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(index * step, 12) for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Chart:
    """A chart of two axes; `draw` puts elements between them."""

    x: Axis
    y: Axis
    x_title: str
    y_title: str

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The place of a pair of values."""
        across, up = self.x.share(x), self.y.share(y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str) -> str:
        """A line through the pairs that are finite."""
        pairs = [self.place(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)
        return f'<polyline class="line {style}" points="{path}"/>'

    def point(self, x: float, y: float, shape: str, style: str, title: str) -> str:
        """A mark that tells its title under the pointer; nothing for a pair that is not finite."""
        if not (math.isfinite(x) and math.isfinite(y)):
            return ""
        return mark(*self.place(x, y), shape, style, title)

    def draw(self, elements: Iterable[str], title: str) -> str:
        """The chart."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
        for tick in self.x.ticks():
            x, _ = self.place(tick, self.y.low)
            parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
        for tick in self.y.ticks():
            _, y = self.place(self.x.low, tick)
            parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        middle, center = (LEFT + right) / 2, (TOP + bottom) / 2
        parts.append(
            f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x_title)}</text>'
        )
        parts.append(
            f'<text class="axis" transform="translate(14 {center:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_title)}</text>"
        )
        return "\n".join([*parts, *filter(None, elements), "</svg>"])


def mark(x: float, y: float, shape: str, style: str, title: str = "", size: float = 5.0) -> str:
    """A filled or, with the class ``hollow``, an empty mark."""
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "down": [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
        "diamond": [(0, -1.3), (1.2, 0), (0, 1.3), (-1.2, 0)],
        "cross": [(-1, -1), (0, 0), (1, 1), (0, 0), (1, -1), (0, 0), (-1, 1), (0, 0)],
    }
    label = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="{0.9 * size:.1f}">{label}</circle>'
    path = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners[shape])
    return f'<polygon class="mark {style}" points="{path}">{label}</polygon>'


def swatch(shape: str, style: str) -> str:
    """A mark for a legend or a line of text."""
    return f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{mark(8, 8, shape, style)}</svg>'


def whisker(axis: Axis, value: float, low: float, high: float, shape: str, style: str) -> str:
    """An interval on an axis, with a line at 1; an end that is not known runs to the edge."""
    width, height = 130, 20

    def at(value: float) -> float:
        return 6 + axis.share(value) * (width - 12)

    ends = f'x1="{at(low):.1f}" y1="10" x2="{at(high):.1f}" y2="10"'
    return (
        f'<svg class="whisker" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line class="one" x1="{at(1):.1f}" y1="0" x2="{at(1):.1f}" y2="{height}"/>'
        f'<line class="interval {style}" {ends}/>{mark(at(value), 10, shape, style, size=4.5)}</svg>'
    )
