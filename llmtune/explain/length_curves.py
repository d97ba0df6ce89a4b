"""Curves over the length of a text on logarithmic axes, as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmtune.explain.flops import Cost, Polynomial, value
from llmtune.explain.labels import briefly
from llmtune.explain.length_cost import Measured

WIDTH, HEIGHT = 500, 310
LEFT, RIGHT, BESIDE, TOP, BOTTOM = 58, 18, 60, 66, 42
"""Margins; BESIDE is that at the right where a second axis stands."""
STEPS = 60
"""Points of a line."""


@dataclass(frozen=True)
class Line:
    """A line, or dots, over the length of a text."""

    name: str
    kind: str
    """Its colour: a, b or c."""
    points: tuple[tuple[float, float], ...]
    dots: bool = False


def draw_costs(cost: Cost, context: int | None) -> Markup:
    """Draw what a forward pass costs: products with weights, and attention's own, up to where they cross."""
    crossing = cost.crossing()
    longest = max(2 * (crossing or 0), min(context or 4096, 32768), 1024)
    weights, pairs = cost.sum(pairs=False), cost.sum(pairs=True)
    lines = [
        Line("products with weights", "a", _follow(weights, 16, longest)),
        Line("attention's own products", "b", _follow(pairs, 16, longest)),
    ]
    title = "Floating-point operations of a text, computed"
    return _draw(lines, title, "FLOPs", mark=(crossing, f"{crossing:,} tokens: equal") if crossing else None)


def draw_measured(parts: dict[str, Polynomial], measured: Measured | None) -> Markup:
    """Draw what one block costs, computed as lines and measured as dots; the axis of seconds is laid on that of FLOPs.

    They are laid so that the dots of the block lie on its line on the mean of their logarithms.
    """
    points = measured.points if measured else ()
    shortest, longest = (points[0].tokens, points[-1].tokens) if len(points) > 1 else (64, 2048)
    lines = [
        Line("a block", "a", _follow(parts["block"], shortest, longest)),
        Line("its self-attention", "b", _follow(parts["attention"], shortest, longest)),
    ]
    if not points:
        return _draw(lines, "One block, computed", "FLOPs")
    speed = rate(parts, measured)
    whole = tuple((point.tokens, point.block_seconds * speed) for point in points)
    lines.append(Line("measured", "a", whole, dots=True))
    part = tuple((p.tokens, p.attention_seconds * speed) for p in points if p.attention_seconds is not None)
    if part:
        lines.append(Line("measured", "b", part, dots=True))
    return _draw(lines, "One block, computed (lines) and measured (dots)", "FLOPs", seconds=speed)


def rate(parts: dict[str, Polynomial], measured: Measured | None) -> float:
    """Return the speed of a block in FLOPs a second, the geometric mean over its lengths."""
    assert measured is not None
    logs = [math.log(value(parts["block"], point.tokens) / point.block_seconds) for point in measured.points]
    return math.exp(sum(logs) / len(logs))


def _follow(polynomial: Polynomial, first: int, last: int) -> tuple[tuple[float, float], ...]:
    steps = [first * (last / first) ** (i / STEPS) for i in range(STEPS + 1)]
    a, b, c = polynomial
    return tuple((x, a + b * x + c * x * x) for x in steps if a + b * x + c * x * x > 0)


def _draw(
    lines: Sequence[Line],
    title: str,
    unit: str,
    *,
    seconds: float | None = None,
    mark: tuple[int, str] | None = None,
) -> Markup:
    right = WIDTH - (RIGHT if seconds is None else BESIDE)
    xs = [math.log2(x) for line in lines for x, _ in line.points]
    ys = [math.log10(y) for line in lines for _, y in line.points]
    low, high = min(ys) - 0.1, max(ys) + 0.1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - min(xs)) / (max(xs) - min(xs))
        up = (math.log10(y) - low) / (high - low)
        return LEFT + (right - LEFT) * across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    floor = HEIGHT - BOTTOM
    parts = [_text(LEFT - 48, 17, title, "name"), *_key(lines)]
    for power in range(math.ceil(low), math.floor(high) + 1):
        y = place(2 ** min(xs), 10.0**power)[1]
        parts.append(_line("grid", LEFT, y, right, y))
        parts.append(_text(LEFT - 7, y + 4, briefly(10.0**power), "", "end"))
    every = 2 if max(xs) - min(xs) > 8 else 1
    for power in range(math.ceil(min(xs)), math.floor(max(xs)) + 1, every):
        x = place(2.0**power, 10**low)[0]
        parts.append(_line("axis", x, floor, x, floor + 4))
        parts.append(_text(x, floor + 18, f"{2**power:,}", "", "middle"))
    parts.append(_text(right, floor + 36, "tokens", "", "end"))
    parts.append(_text(LEFT - 7, TOP - 10, unit, "", "end"))
    parts.append(_line("axis", LEFT, floor, right, floor))
    if seconds is not None:
        parts += _second_axis(right, seconds, low, high, lambda y: place(2 ** min(xs), y)[1])
    if mark is not None:
        x = place(mark[0], 10**low)[0]
        parts += [_line("mark", x, TOP, x, floor), _text(x - 6, floor - 8, mark[1], "", "end")]
    for line in lines:
        spots = [place(x, y) for x, y in line.points]
        if line.dots:
            dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>')
            parts += [dot.format(line.kind, x, y) for x, y in spots]
        else:
            way = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
            parts.append(Markup('<path class="{}" d="M{}"/>').format(line.kind, way))
    return Markup('<svg class="curves" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )


def _second_axis(
    right: float, seconds: float, low: float, high: float, place: Callable[[float], float]
) -> list[Markup]:
    parts = [_text(right + 7, TOP - 10, "seconds", "")]
    first, last = low - math.log10(seconds), high - math.log10(seconds)
    for power in range(math.ceil(first), math.floor(last) + 1):
        y = place(10.0**power * seconds)
        parts.append(_line("axis", right - 3, y, right + 3, y))
        unit, shift = ("s", 0) if power >= 0 else ("ms", 3) if power >= -3 else ("µs", 6)
        word = f"{10.0 ** (power + shift):g} {unit}"
        parts.append(_text(right + 7, y + 4, word, ""))
    return parts


def _key(lines: Sequence[Line]) -> list[Markup]:
    parts, x, dotted = [], float(LEFT - 48), False
    for line in lines:
        if line.dots and dotted:
            continue  # its colour is told by the line
        dotted |= line.dots
        if line.dots:
            parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="36" r="4.5"/>').format(line.kind, x + 10))
        else:
            parts.append(Markup('<path class="{}" d="M{:.1f} 36h20"/>').format(line.kind, x))
        parts.append(_text(x + 26, 40, line.name, "key"))
        x += 26 + 6.6 * len(line.name) + 16
    return parts


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)
