"""Line charts as inline SVG. Colours are the page's CSS variables, so a chart follows light and dark mode.

Texts in a chart are escaped. Failure mode: a series with gaps or one point that draws nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 30
TICKS = 5
MOST_POINTS = 400
"""A longer series is thinned for the page; its smoothed line stays."""


@dataclass(frozen=True)
class Series:
    """A line through (x, y), in the order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    """A CSS colour, such as var(--after)."""
    faint: bool = False
    """A thin line behind the others, without a legend."""
    points: bool = False
    """Mark each point, with its numbers as a tooltip."""
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    """The interval of each y, drawn as a band."""


def line_chart(title: str, series: Sequence[Series], *, mark: float | None = None, level: float | None = None) -> str:
    """The chart as an `svg` element. `mark` draws a vertical line at an x, `level` a horizontal one at a y."""
    drawn = [s for s in series if len(s.x)]
    xs = [x for s in drawn for x in s.x]
    ys = [y for s in drawn for values in (s.y, s.low, s.high) for y in values] + ([] if level is None else [level])
    left, right = (min(xs), max(xs)) if xs else (0.0, 1.0)
    bottom, top, ticks = _range(min(ys, default=0.0), max(ys, default=1.0))

    def at_x(x: float) -> float:
        share = (x - left) / (right - left) if right > left else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - BOTTOM - TOP)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']

    def horizontal(kind: str, y: float) -> str:
        return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'

    for tick in ticks:
        parts.append(horizontal("grid", tick))
        label = f'<text x="{LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{_label(tick, ticks)}</text>'
        parts.append(label)
    for x in _x_ticks(left, right):
        parts.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{x:g}</text>')
    if level is not None:
        parts.append(horizontal("level", level))
    if mark is not None and left <= mark <= right:
        line = f'<line class="mark" x1="{at_x(mark):.1f}" x2="{at_x(mark):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        parts.append(f"{line}<title>best: step {mark:g}</title></line>")
    for s in drawn:
        parts += _drawn(s, at_x, at_y)
    return "".join([*parts, "</svg>"])


def _drawn(s: Series, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
    parts = []
    if s.low and s.high:
        there = [f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(s.x, s.high, strict=True)]
        back = [f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(s.x, s.low, strict=True)]
        points = " ".join(there + back[::-1])
        parts.append(f'<polygon class="band" style="fill:{s.colour}" points="{points}"/>')
    every = max(1, math.ceil(len(s.x) / MOST_POINTS))
    kept = sorted({*range(0, len(s.x), every), len(s.x) - 1})
    points = " ".join(f"{at_x(s.x[i]):.1f},{at_y(s.y[i]):.1f}" for i in kept)
    parts.append(f'<polyline class="{"faint" if s.faint else "line"}" style="stroke:{s.colour}" points="{points}"/>')
    for i in kept if s.points or len(kept) == 1 else ():
        interval = f" ({s.low[i]:.3g} to {s.high[i]:.3g})" if s.low and s.high else ""
        title = escape(f"{s.name}, step {s.x[i]:g}: {s.y[i]:.4g}{interval}")
        place = f'cx="{at_x(s.x[i]):.1f}" cy="{at_y(s.y[i]):.1f}"'
        parts.append(f'<circle style="fill:{s.colour}" {place} r="3"><title>{title}</title></circle>')
    return parts


def legend(series: Sequence[Series]) -> str:
    """The names of the series with their colours, as HTML."""
    return "".join(
        f'<span class="key"><span class="dot" style="background:{s.colour}"></span>{escape(s.name)}</span>'
        for s in series
        if not s.faint and len(s.x)
    )


def _range(low: float, high: float) -> tuple[float, float, list[float]]:
    """A range of round numbers around the values, and its ticks."""
    # Values that differ by rounding alone are one value.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    raw = (high - low) / TICKS
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _x_ticks(left: float, right: float) -> list[float]:
    if left == right:
        return [left]
    return [x for x in _range(left, right)[2] if left <= x <= right and x == round(x)] or [left, right]


def _label(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, digits) != round(step, digits + 2):
        digits += 1
    text = f"{tick:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")
