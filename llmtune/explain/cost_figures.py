"""What a text costs by its length, and how long a block takes, as curves on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

from llmtune.explain.block_timing import Measured
from llmtune.explain.figures import BLUE, LINE, MUTED, ORANGE, figure_settings, save_figure
from llmtune.explain.flops import Cost, Polynomial, value
from llmtune.explain.labels import briefly

Lines = Sequence[tuple[str, str, Polynomial]]
"""Name, colour and cost of each line."""


def draw_costs(stem: Path, cost: Cost, context: int | None) -> list[Path]:
    """Draw what a forward pass costs into `stem`.svg: both kinds of products, up to where they cross."""
    crossing = cost.crossing()
    longest = max(2 * (crossing or 0), min(context or 4096, 32768), 1024)
    lines = [
        ("products with weights", BLUE, cost.sum(pairs=False)),
        ("attention's own products", ORANGE, cost.sum(pairs=True)),
    ]
    with figure_settings([], stem.name):
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        _draw_lines(axes, lines, 16, longest, "Floating-point operations of a text, computed")
        if crossing:
            axes.axvline(crossing, color=MUTED, linewidth=1, linestyle="--")
            axes.text(crossing, 0.02, f"{crossing:,} tokens: equal ", transform=axes.get_xaxis_transform(), ha="right")
        axes.legend(frameon=False)
        return save_figure(figure, stem, ("svg",))


def draw_times(stem: Path, parts: dict[str, Polynomial], measured: Measured) -> list[Path]:
    """Draw what one block costs into `stem`.svg, computed as lines and measured as dots.

    The axis of seconds is laid so that the dots of the block lie on its line on the mean of their logarithms.
    """
    points, speed = measured.points, measured.speed(parts["block"])
    lines = [("a block", BLUE, parts["block"]), ("its self-attention", ORANGE, parts["attention"])]
    ends = (points[0].tokens, points[-1].tokens) if len(points) > 1 else (64, 2048)
    with figure_settings([], stem.name):
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        _draw_lines(axes, lines, *ends, "One block, computed (lines) and measured (dots)")
        axes.plot([p.tokens for p in points], [p.block_seconds * speed for p in points], "o", color=BLUE)
        part = [(p.tokens, p.attention_seconds * speed) for p in points if p.attention_seconds is not None]
        axes.plot([tokens for tokens, _ in part], [flops for _, flops in part], "o", color=ORANGE)
        seconds = axes.secondary_yaxis(
            "right", functions=(lambda y: np.asarray(y) / speed, lambda y: np.asarray(y) * speed)
        )
        seconds.set_ylabel("seconds", color=MUTED)
        seconds.yaxis.set_major_formatter(EngFormatter("s"))
        axes.legend(frameon=False)
        return save_figure(figure, stem, ("svg",))


def _draw_lines(axes: Axes, lines: Lines, first: int, last: int, title: str) -> None:
    lengths = np.geomspace(first, last, 61)
    for name, colour, (a, b, c) in lines:
        axes.plot(lengths, a + b * lengths + c * lengths**2, color=colour, linewidth=1.8, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lowest = min(value(cost, first) for _, _, cost in lines)
    axes.set_ylim(bottom=0.8 * lowest if lowest else None)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: briefly(y)))
    axes.set_title(title, loc="left", weight="bold", fontsize=10)
    axes.set_xlabel("tokens", color=MUTED)
    axes.set_ylabel("FLOPs", color=MUTED)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
