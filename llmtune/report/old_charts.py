"""Charts as inline SVG that takes its colours from the page, so that it reads in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from llmtune.report.number_format import short

Point = tuple[float, float]
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 480, 52, 14, 12, 34
MOST_POINTS = 300
LETTER, SLANT = 7.6, (0.77, 0.64)
"""Width of a letter of a label, and how far a slanted one (40 degrees) reaches across and up, by its length."""
LONGEST_LABEL = 19
TOO_LARGE = 1e30  # no axis reaches there; false for NaN too


def line_chart(
    series: Sequence[tuple[str, Sequence[Point]]], *, label: str, height: int = 240, axis: str = "step"
) -> Markup:
    """Draw lines over steps, or over what `axis` says; each series is (CSS class, points).

    Points that are NaN or beyond 1e30 are left out.
    """
    lines = [(name, thin([point for point in points if abs(point[1]) < TOO_LARGE])) for name, points in series]
    points = [point for _, line in lines for point in line]
    if not points:
        return Markup("")
    xs, ys = ticks(*bounds([x for x, _ in points]), 6), ticks(*bounds([y for _, y in points]), 5)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(ys[0], min(y for _, y in points)), max(ys[-1], max(y for _, y in points))

    def x_at(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / ((x_high - x_low) or 1)

    def y_at(y: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * (y - y_low) / ((y_high - y_low) or 1)

    parts = [grid_line(y_at(y), short(y)) for y in ys]
    parts += [text(x_at(x), height - BOTTOM + 18, short(x), "middle") for x in xs if x_low <= x <= x_high]
    parts.append(text(WIDTH - RIGHT, height - 2, axis, "end"))
    for name, line in lines:
        at = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line)
        if len(line) > 1:
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(name, at))
        if len(line) <= 12:
            dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"/>')
            parts += [dot.format(name, f"{x_at(x):.1f}", f"{y_at(y):.1f}") for x, y in line]
    return svg(parts, WIDTH, height, label)


def interval_chart(value: float, low: float, high: float, *, reach: float, better: int, label: str) -> Markup:
    """Draw one difference and its interval about zero, turned so that better is right; `reach` is the half-width."""
    width, height = 160, 26
    ends = (value, low, high)
    if not all(math.isfinite(end) for end in ends) or not reach:
        return Markup("")
    value_x, low_x, high_x = (width / 2 + better * end / reach * (width / 2 - 6) for end in ends)
    left, right = sorted((low_x, high_x))
    kind = "better" if left > width / 2 else "worse" if right < width / 2 else "unsure"
    parts = [
        Markup('<line class="axis" x1="4" x2="{}" y1="13" y2="13"/>').format(width - 4),
        Markup('<line class="zero" x1="{0}" x2="{0}" y1="3" y2="23"/>').format(width / 2),
        Markup('<line class="span {}" x1="{:.1f}" x2="{:.1f}" y1="13" y2="13"/>').format(
            kind, left, max(right, left + 1)
        ),
        Markup('<circle class="dot {}" cx="{:.1f}" cy="13" r="4.5"/>').format(kind, value_x),
    ]
    return svg(parts, width, height, label)


def bar_chart(edges: Sequence[float], counts: Sequence[float], *, label: str, height: int = 180) -> Markup:
    """Draw a histogram: `counts[i]` lies between `edges[i]` and `edges[i + 1]`."""
    if not counts or not max(counts):
        return Markup("")
    ys = ticks(0, max(counts), 4)
    top = max(ys[-1], max(counts))
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    floor = height - BOTTOM
    parts = [grid_line(floor - (floor - TOP) * y / top, short(y)) for y in ys]
    for i, number in enumerate(counts):
        tall = (floor - TOP) * number / top
        parts.append(
            Markup(
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            ).format(
                LEFT + i * step + 1,
                floor - tall,
                max(step - 2, 1),
                tall,
                f"{edges[i]:g} to {edges[i + 1]:g}: {number:g}",
            )
        )
    every = max(1, math.ceil(len(edges) / 8))
    parts += [text(LEFT + i * step, floor + 18, short(edges[i]), "middle") for i in range(0, len(edges), every)]
    parts.append(text(WIDTH - RIGHT, height - 2, "tokens", "end"))
    return svg(parts, WIDTH, height, label)


def matrix_chart(labels: Sequence[str], counts: Sequence[Sequence[int]], *, label: str) -> Markup:
    """Draw a confusion matrix: right classes down, predicted ones across; a cell's tint is its share of its row."""
    size = len(labels)
    names = [shortened(name) for name in labels]
    longest = LETTER * max(map(len, names))
    wide, tall = (104, 52) if size <= 4 else (68, 46) if size <= 10 else (42, 40)
    slanted = longest > wide - 6
    left, top = longest + 34, 28 + (SLANT[1] * longest + 14 if slanted else 22)
    width = left + size * wide + (max(0.0, SLANT[0] * longest - wide / 2) if slanted else 4)
    parts = [
        text(left + size * wide / 2, 15, "predicted", "middle"),
        Markup('<text transform="translate(14 {:.1f}) rotate(-90)" text-anchor="middle">right class</text>').format(
            top + size * tall / 2
        ),
    ]
    for k, name in enumerate(names):
        x = left + (k + 0.5) * wide
        slant = Markup('<text class="name" transform="translate({:.1f} {:.1f}) rotate(-40)">{}{}</text>')
        across = Markup('<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}{}</text>')
        parts.append((slant if slanted else across).format(x, top - 9, name, whole(labels[k])))
        down = Markup('<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="end">{}{}</text>')
        parts.append(down.format(left - 10, top + (k + 0.5) * tall + 5, name, whole(labels[k])))
    for i, row in enumerate(counts):
        for k, number in enumerate(row):
            told = f"{labels[i]} taken for {labels[k]}" if i != k else f"{labels[i]} found"
            kind, part = ("hit" if i == k else "miss"), number / (sum(row) or 1)
            parts.append(cell(left + k * wide, top + i * tall, (wide, tall), kind, number, part, told))
    return svg(parts, math.ceil(width), math.ceil(top + size * tall + 4), label, fixed=True)


def shortened(label: str) -> str:
    """Leave out the middle of a long label: names of a kind differ at their ends."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half].rstrip()}…{label[-half:].lstrip()}"


def few_digits(number: int, wide: int) -> str:
    """Write a count so that it fits into a field `wide` units wide."""
    most = 10_000 if wide > 60 else 1000
    return f"{number:,}" if number < most else f"{number / 1000:,.{0 if number >= 9950 else 1}f}k"


def whole(label: str) -> Markup:
    """The whole of a label, for those that are cut."""
    return Markup("<title>{}</title>").format(label)


def cell(x: float, y: float, size: tuple[int, int], kind: str, number: int, part: float, told: str) -> Markup:
    """Draw one field: its count, and below its share of the row in percent."""
    wide, tall = size
    parts = [
        Markup('<rect class="field" x="{:.1f}" y="{:.1f}" width="{}" height="{}" rx="4"/>').format(
            x + 1, y + 1, wide - 2, tall - 2
        ),
        Markup(
            '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{}" height="{}" rx="4" fill-opacity="{:.3f}">'
            "<title>{}: {:,} rows, {:.1%}</title></rect>"
        ).format(kind, x + 1, y + 1, wide - 2, tall - 2, tint(part), told, number, part),
    ]
    if number:
        middle, shown = x + wide / 2, few_digits(number, wide)
        parts.append(
            Markup('<text class="count" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
                middle, y + tall / 2, shown
            )
        )
        percent = f"{100 * part:.0f} %" if part >= 0.005 else "< 1 %"
        parts.append(
            Markup('<text class="part" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(
                middle, y + tall / 2 + 15, percent
            )
        )
    return Markup("").join(parts)


def tint(part: float) -> float:
    """Return how strong a field is coloured: never so much that its number could not be read, and never unseen."""
    return 0.08 + 0.42 * part if part else 0.0


def svg(parts: Sequence[Markup], width: float, height: float, label: str, *, fixed: bool = False) -> Markup:
    """Wrap shapes into a picture with a name for those who do not see it; a fixed one keeps its size on any page."""
    size = Markup(' width="{}" height="{}"').format(width, height) if fixed else ""
    return Markup('<svg viewBox="0 0 {} {}"{} role="img" aria-label="{}">{}</svg>').format(
        width, height, size, label, Markup("").join(parts)
    )


def grid_line(y: float, label: str) -> Markup:
    """Draw a line across, with its value on the left."""
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
    return line + text(LEFT - 8, y + 4, label, "end")


def text(x: float, y: float, label: str, anchor: str) -> Markup:
    """Write a label."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(label))


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return lowest and highest, far enough apart to draw an axis between them."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    margin = max(0.5, largest / 1000)
    return (low, high) if high - low > largest * 1e-6 else (low - margin, high + margin)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round numbers (1, 2, 5 times a power of ten) from at or below `low` to at or above `high`."""
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[Point]) -> list[Point]:
    """Average neighbours until at most `MOST_POINTS` are left."""
    group = math.ceil(len(points) / MOST_POINTS) if points else 1
    if group == 1:
        return list(points)
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
