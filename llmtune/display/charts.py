"""Charts as inline SVG for HTML pages; colours come from the page and adapt to light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmtune.display.number_format import short

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 480, 52, 14, 12, 34
SMALL_WIDTH, SMALL_HEIGHT = 160, 26
"""Size of a picture in a table cell."""
MOST_POINTS, MOST_DOTS = 300, 12
ChartPoint = tuple[float, float]
TOO_LARGE = 1e30  # beyond any axis; comparison is false for NaN too


@dataclass(frozen=True)
class Curve:
    """One line of a chart; its style decides its colour, the same on all pages."""

    name: str
    points: Sequence[ChartPoint]
    style: str = "train"
    """train, validation, other, or s0 to s5 for one of several similar lines."""


def draw_curves(
    curves: Sequence[Curve], *, label: str, title: str = "", axis: str = "step", height: int = 240
) -> Markup:
    """Draw lines over a common axis; return empty markup if no point is finite.

    `label` is the text for screen readers. Points that are NaN or beyond 1e30 are skipped.
    """
    lines = [(one.style, thin([point for point in one.points if abs(point[1]) < TOO_LARGE])) for one in curves]
    points = [point for _, line in lines for point in line]
    if not points:
        return Markup("")
    floor = height - BOTTOM
    xs, ys = ticks(*bounds([x for x, _ in points]), 6), ticks(*bounds([y for _, y in points]), 5)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(ys[0], min(y for _, y in points)), max(ys[-1], max(y for _, y in points))

    def x_at(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / ((x_high - x_low) or 1)

    def y_at(y: float) -> float:
        return floor - (floor - TOP) * (y - y_low) / ((y_high - y_low) or 1)

    parts = [grid_line(y_at(y), short(y)) for y in ys]
    parts += [text(x_at(x), floor + 18, short(x)) for x in xs if x_low <= x <= x_high]
    parts.append(text(WIDTH - RIGHT, height - 2, axis, "end"))
    for style, line in lines:
        joined = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line)
        if len(line) > 1:
            parts.append(element("polyline", class_=f"line {style}", points=joined))
        if len(line) <= MOST_DOTS:
            parts += [element("circle", class_=f"dot {style}", cx=x_at(x), cy=y_at(y), r=3) for x, y in line]
    names = [element("span", element("i", class_=one.style) + one.name) for one in curves if one.points]
    key = element("p", Markup("").join(names), class_="key") if len(curves) > 1 else ""
    return heading(title) + key + svg(parts, WIDTH, height, label) + "\n"


def draw_histogram(
    edges: Sequence[float], counts: Sequence[float], *, label: str, title: str = "", axis: str = ""
) -> Markup:
    """Draw bars, `counts[i]` between `edges[i]` and `edges[i + 1]`; return empty markup if all counts are zero."""
    if not counts or not max(counts):
        return Markup("")
    height, floor = 180, 180 - BOTTOM
    ys = ticks(0, max(counts), 4)
    top = max(ys[-1], max(counts))
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    parts = [grid_line(floor - (floor - TOP) * y / top, short(y)) for y in ys]
    for i, number in enumerate(counts):
        tall = (floor - TOP) * number / top
        tip = element("title", f"{edges[i]:g} to {edges[i + 1]:g}: {number:g}")
        x, width = LEFT + i * step + 1, max(step - 2, 1)
        parts.append(element("rect", tip, class_="bar", x=x, y=floor - tall, width=width, height=tall))
    every = max(1, math.ceil(len(edges) / 8))
    parts += [text(LEFT + i * step, floor + 18, short(edges[i])) for i in range(0, len(edges), every)]
    parts.append(text(WIDTH - RIGHT, height - 2, axis, "end"))
    return heading(title) + svg(parts, WIDTH, height, label) + "\n"


def draw_reliability(
    bins: Sequence[tuple[float, float, float]], *, label: str, title: str = "", style: str = "train"
) -> Markup:
    """Draw (probability, share right, size) of each bin as a dot next to the diagonal; the size is a dot's area."""
    height, largest = 300, max(size for *_, size in bins)
    wide, tall = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * x, TOP + tall * (1 - y)

    (x1, y1), (x2, y2) = at(0, 0), at(1, 1)
    marks = [i / 5 for i in range(6)]
    parts = [grid_line(at(0, mark)[1], short(mark)) for mark in marks]
    parts += [text(at(mark, 0)[0], height - BOTTOM + 18, short(mark)) for mark in marks]
    parts += [text(WIDTH - RIGHT, height - 6, "probability", "end"), text(LEFT + 4, TOP + 12, "share right", "start")]
    parts.append(element("line", class_="zero", x1=x1, y1=y1, x2=x2, y2=y2))
    for probability, right, size in bins:
        (x, y), tip = at(probability, right), f"{probability:.2f}: {100 * right:.0f} % of {size:g} right"
        radius = 2 + 9 * math.sqrt(size / largest)
        parts.append(element("circle", element("title", tip), class_=f"dot {style}", cx=x, cy=y, r=radius))
    return heading(title) + svg(parts, WIDTH, height, label) + "\n"


def draw_interval(value: float, low: float, high: float, *, better: int, label: str) -> Markup:
    """Draw a difference and its interval around zero; the better side (1: more, -1: less) is on the right."""
    ends = (value, low, high)
    reach = max(map(abs, ends))
    if not all(map(math.isfinite, ends)) or not reach:
        return Markup("")
    center, middle = SMALL_WIDTH / 2, SMALL_HEIGHT // 2
    value_x, low_x, high_x = (center + better * end / reach * (center - 6) for end in ends)
    left, right = sorted((low_x, high_x))
    tone = "better" if left > center else "worse" if right < center else "unsure"
    parts = [
        element("line", class_="axis", x1=4, x2=SMALL_WIDTH - 4, y1=middle, y2=middle),
        element("line", class_="zero", x1=center, x2=center, y1=3, y2=SMALL_HEIGHT - 3),
        element("line", class_=f"span {tone}", x1=left, x2=max(right, left + 1), y1=middle, y2=middle),
        element("circle", class_=f"dot {tone}", cx=value_x, cy=middle, r=4.5),
    ]
    return svg(parts, SMALL_WIDTH, SMALL_HEIGHT, label)


def draw_meter(share: float) -> Markup:
    """Draw a bar filled to a share from 0 to 1."""
    return element("div", element("b", style=f"width: {100 * share:.1f}%"), class_="meter")


def heading(title: str) -> Markup:
    """Return the title of a chart or another part as a heading, empty without a title."""
    return element("h3", title) if title else Markup("")


def svg(parts: Sequence[Markup], width: float, height: float, label: str) -> Markup:
    """Wrap shapes in an SVG element with a label for screen readers."""
    box = f"0 0 {width} {height}"
    return element("svg", Markup("").join(parts), viewBox=box, role="img", aria_label=label)


def grid_line(y: float, label: str) -> Markup:
    """Draw a horizontal grid line with its value on the left."""
    return element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y) + text(LEFT - 8, y + 4, label, "end")


def text(x: float, y: float, label: str, anchor: str = "middle") -> Markup:
    """Draw a label."""
    return element("text", label, x=x, y=y, text_anchor=anchor)


def element(name: str, content: str = "", /, **attributes: str | float) -> Markup:
    """Return an element. Text is escaped, floats have one decimal, and `_` in attribute names becomes `-`."""
    written = [
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(written), content)


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value, widened if they are too close for an axis."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    margin = max(0.5, largest / 1000)
    return (low, high) if high - low > largest * 1e-6 else (low - margin, high + margin)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round steps (1, 2, 5 times a power of ten) that cover `low` to `high`."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[ChartPoint]) -> list[ChartPoint]:
    """Average neighbouring points to at most `MOST_POINTS`."""
    group = math.ceil(len(points) / MOST_POINTS) if points else 1
    if group == 1:
        return list(points)
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
