"""Charts as inline SVG that takes its colours from the page, so that it reads in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from llmtune.report.blocks import Curves, Dots, Heatmap, Histogram, Interval, Point
from llmtune.report.number_format import missing, score, short

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 480, 52, 14, 12, 34
SMALL_WIDTH, SMALL_HEIGHT, MARGIN = 160, 26, 8
"""Size of a picture in a cell of a table, and what it leaves free on both sides."""
MOST_POINTS, MOST_DOTS = 300, 12
LETTER, SLANT = 7.6, (0.77, 0.64)
"""Width of a letter of a label, and how far a slanted one (40 degrees) reaches across and up, by its length."""
LONGEST_LABEL = 19
TOO_LARGE = 1e30  # no axis reaches there; false for NaN too


def draw_curves(block: Curves) -> Markup:
    """Draw lines over a common axis; nothing where no point is finite."""
    lines = [(one.style, thin([point for point in one.points if abs(point[1]) < TOO_LARGE])) for one in block.curves]
    points = [point for _, line in lines for point in line]
    if not points:
        return Markup("")
    height, floor = block.height, block.height - BOTTOM
    xs, ys = ticks(*bounds([x for x, _ in points]), 6), ticks(*bounds([y for _, y in points]), 5)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(ys[0], min(y for _, y in points)), max(ys[-1], max(y for _, y in points))

    def x_at(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / ((x_high - x_low) or 1)

    def y_at(y: float) -> float:
        return floor - (floor - TOP) * (y - y_low) / ((y_high - y_low) or 1)

    parts = [grid_line(y_at(y), short(y)) for y in ys]
    parts += [text(x_at(x), floor + 18, short(x)) for x in xs if x_low <= x <= x_high]
    parts.append(text(WIDTH - RIGHT, height - 2, block.axis, "end"))
    for style, line in lines:
        joined = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line)
        if len(line) > 1:
            parts.append(element("polyline", class_=f"line {style}", points=joined))
        if len(line) <= MOST_DOTS:
            parts += [element("circle", class_=f"dot {style}", cx=x_at(x), cy=y_at(y), r=3) for x, y in line]
    return svg(parts, WIDTH, height, block.label)


def draw_histogram(block: Histogram) -> Markup:
    """Draw a bar a count; nothing where there are none."""
    edges, counts = block.edges, block.counts
    if not counts or not max(counts):
        return Markup("")
    height, floor = 180, 180 - BOTTOM
    ys = ticks(0, max(counts), 4)
    top = max(ys[-1], max(counts))
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    parts = [grid_line(floor - (floor - TOP) * y / top, short(y)) for y in ys]
    for i, number in enumerate(counts):
        tall = (floor - TOP) * number / top
        title = element("title", f"{edges[i]:g} to {edges[i + 1]:g}: {number:g}")
        x, width = LEFT + i * step + 1, max(step - 2, 1)
        parts.append(element("rect", title, class_="bar", x=x, y=floor - tall, width=width, height=tall))
    every = max(1, math.ceil(len(edges) / 8))
    parts += [text(LEFT + i * step, floor + 18, short(edges[i])) for i in range(0, len(edges), every)]
    parts.append(text(WIDTH - RIGHT, height - 2, block.axis, "end"))
    return svg(parts, WIDTH, height, block.label)


def draw_interval(picture: Interval) -> Markup:
    """Draw a difference and its interval about zero, turned so that better is on the right."""
    ends = (picture.value, picture.low, picture.high)
    reach = max(map(abs, ends))
    if not all(map(math.isfinite, ends)) or not reach:
        return Markup("")
    center, middle = SMALL_WIDTH / 2, SMALL_HEIGHT // 2
    value_x, low_x, high_x = (center + picture.better * end / reach * (center - 6) for end in ends)
    left, right = sorted((low_x, high_x))
    tone = "better" if left > center else "worse" if right < center else "unsure"
    parts = [
        element("line", class_="axis", x1=4, x2=SMALL_WIDTH - 4, y1=middle, y2=middle),
        element("line", class_="zero", x1=center, x2=center, y1=3, y2=SMALL_HEIGHT - 3),
        element("line", class_=f"span {tone}", x1=left, x2=max(right, left + 1), y1=middle, y2=middle),
        element("circle", class_=f"dot {tone}", cx=value_x, cy=middle, r=4.5),
    ]
    return svg(parts, SMALL_WIDTH, SMALL_HEIGHT, picture.label)


def draw_dots(picture: Dots) -> Markup:
    """Draw each score as a dot on one line, and the base as a stroke across it."""
    values = [picture.base, *picture.values]
    if any(map(missing, values)) or min(values) == max(values):
        return Markup("")
    low, high = min(values), max(values)

    def x_at(value: float) -> float:
        return MARGIN + (SMALL_WIDTH - 2 * MARGIN) * (value - low) / (high - low)

    middle, x = SMALL_HEIGHT // 2, x_at(picture.base)
    base = element("title", f"base {score(picture.base)}")
    parts = [
        element("line", class_="axis", x1=4, x2=SMALL_WIDTH - 4, y1=middle, y2=middle),
        element("line", base, class_="zero", x1=x, x2=x, y1=3, y2=SMALL_HEIGHT - 3),
    ]
    for value in picture.values:
        title = element("title", score(value))
        parts.append(element("circle", title, class_="dot train", cx=x_at(value), cy=middle, r=4, fill_opacity="0.6"))
    return svg(parts, SMALL_WIDTH, SMALL_HEIGHT, picture.label)


def draw_heatmap(block: Heatmap) -> Markup:
    """Draw a matrix: a cell's colour is the sign of its value, and its tint the size."""
    wide, tall = cell_size(len(block.columns), bool(block.texts))
    longest_row, longest = (
        LETTER * max(len(shortened(name)) for name in names) for names in (block.rows, block.columns)
    )
    slanted = longest > wide - 6
    left, top = longest_row + 34, 28 + (SLANT[1] * longest + 14 if slanted else 22)
    width = left + len(block.columns) * wide + (max(0.0, SLANT[0] * longest - wide / 2) if slanted else 4)
    height = top + len(block.rows) * tall + 4
    down = f"translate(14 {top + len(block.rows) * tall / 2:.1f}) rotate(-90)"
    parts = [
        text(left + len(block.columns) * wide / 2, 15, block.across),
        element("text", block.down, transform=down, text_anchor="middle"),
    ]
    for k, name in enumerate(block.columns):
        x, y = left + (k + 0.5) * wide, top - 9
        label = Markup("{}{}").format(shortened(name), element("title", name))
        if slanted:
            parts.append(element("text", label, class_="name", transform=f"translate({x:.1f} {y:.1f}) rotate(-40)"))
        else:
            parts.append(element("text", label, class_="name", x=x, y=y, text_anchor="middle"))
    for i, name in enumerate(block.rows):
        label = Markup("{}{}").format(shortened(name), element("title", name))
        y = top + (i + 0.5) * tall + 5
        parts.append(element("text", label, class_="name", x=left - 10, y=y, text_anchor="end"))
        parts += [heat_cell(block, i, k, left + k * wide, top + i * tall) for k in range(len(block.columns))]
    return svg(parts, math.ceil(width), math.ceil(height), block.label, fixed=True)


def cell_size(columns: int, written: bool) -> tuple[int, int]:
    """Return width and height of a cell of a heatmap, by how many stand side by side and whether text is in them."""
    if not written:
        return (26, 22) if columns <= 30 else (14, 14)
    return (104, 52) if columns <= 4 else (68, 46) if columns <= 10 else (42, 40)


def heat_cell(block: Heatmap, i: int, k: int, x: float, y: float) -> Markup:
    """Draw one cell of a heatmap, with its text if there is some."""
    wide, tall = cell_size(len(block.columns), bool(block.texts))

    def field(style: str, opacity: float, tip: str = "") -> Markup:
        content = element("title", tip) if tip else ""
        size = {"x": x + 1, "y": y + 1, "width": wide - 2, "height": tall - 2}
        return element("rect", content, class_=style, fill_opacity=f"{opacity:.3f}", rx=3, **size)

    value = block.values[i][k]
    known = 0.0 if value is None or not math.isfinite(value) else value
    tip = block.tips[i][k] if block.tips else ""
    parts = [field("field", 1), field("miss" if known < 0 else "hit", tint(abs(known), bool(block.texts)), tip)]
    lines = block.texts[i][k].splitlines() if block.texts else []
    for number, (line, style) in enumerate(zip(lines, ("count", "part"), strict=False)):
        at = y + tall / 2 + 15 * number
        parts.append(element("text", line, class_=style, x=x + wide / 2, y=at, text_anchor="middle"))
    return Markup("").join(parts)


def tint(size: float, written: bool) -> float:
    """Return how strong a cell is coloured: never so much that its text could not be read, and never unseen."""
    return 0.0 if not size else 0.08 + (0.42 if written else 0.92) * size


def shortened(label: str) -> str:
    """Leave out the middle of a long label: names of a kind differ at their ends."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half].rstrip()}…{label[-half:].lstrip()}"


def svg(parts: Sequence[Markup], width: float, height: float, label: str, *, fixed: bool = False) -> Markup:
    """Wrap shapes into a picture with a name for those who do not see it; a fixed one keeps its size on any page."""
    size = {"width": width, "height": height} if fixed else {}
    box = f"0 0 {width} {height}"
    return element("svg", Markup("").join(parts), viewBox=box, **size, role="img", aria_label=label)


def grid_line(y: float, label: str) -> Markup:
    """Draw a line across, with its value on the left."""
    return element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y) + text(LEFT - 8, y + 4, label, "end")


def text(x: float, y: float, label: str, anchor: str = "middle") -> Markup:
    """Write a label."""
    return element("text", label, x=x, y=y, text_anchor=anchor)


def element(name: str, content: str = "", /, **attributes: str | float) -> Markup:
    """Write an SVG element; text is escaped, numbers have one decimal, and `_` in a name stands for `-`."""
    written = [
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(written), content)


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return lowest and highest, far enough apart to draw an axis between them."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    margin = max(0.5, largest / 1000)
    return (low, high) if high - low > largest * 1e-6 else (low - margin, high + margin)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers (1, 2, 5 times a power of ten) from at or below `low` to at or above `high`."""
    raw = (high - low) / count
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
