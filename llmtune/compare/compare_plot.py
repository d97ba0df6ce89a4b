"""A comparison as one picture, PNG and SVG: what each run cost as bars, what it gained over its base with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.compare.compare_page import COSTS
from llmtune.compare.comparison import RunSummary
from llmtune.report.metric_info import better_side, rank_metrics
from llmtune.report.number_format import MINUS, missing, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = [cost for cost in COSTS if cost[0] in ("train_seconds", "peak_bytes", "trainable", "disk_bytes")]
COLOURS = ("#2563c9", "#0f9d8a", "#8e5bd0", "#d9822b", "#c2417c", "#64748b")
MUTED, LINE = "#5c6470", "#d5d9df"
PANEL_IN, ROW_IN, LETTER_IN, DPI = 1.85, 0.3, 0.075, 130
"""Width of a panel, height of a run and width of a letter in inches."""
MOST_SCORES = 2
"""Panels of scores: the metrics that say most."""
ROOM = 1.75
"""Of the longest bar: the width of a panel, for the number behind the bar."""
SETTINGS: Any = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "comparison", "text.parse_math": False}


def draw_comparison(path: Path, runs: Sequence[RunSummary]) -> None:
    """Draw the comparison into `path` with .png and .svg."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = shown_metrics(runs)
    panels = len(BARS) + len(metrics)
    left = LETTER_IN * max(len(run.name) for run in runs) + 0.25
    width, tall = left + panels * PANEL_IN + 0.1, ROW_IN * len(runs)
    height = tall + 0.95
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        for number in range(panels):
            bounds = ((left + number * PANEL_IN) / width, 0.5 / height, (PANEL_IN - 0.2) / width, tall / height)
            axes = figure.add_axes(bounds)
            if number < len(BARS):
                draw_bars(axes, runs, *BARS[number])
            else:
                draw_gains(axes, runs, metrics[number - len(BARS)])
            frame(axes, [run.name for run in runs] if number == 0 else [""] * len(runs))
        figure.savefig(path.with_suffix(".png"), dpi=DPI, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def shown_metrics(runs: Sequence[RunSummary]) -> list[str]:
    """Return the metrics that say most and have a better side, of those that every run has with an interval."""
    metrics = [metric for metric in rank_metrics(runs[0].difference) if better_side(metric)]
    known = [metric for metric in metrics if all(metric in run.difference for run in runs)]
    return [metric for metric in known if not any(map(missing, ends_of(runs, metric)))][:MOST_SCORES]


def ends_of(runs: Sequence[RunSummary], metric: str) -> list[float]:
    """Return gains and ends of their intervals of all runs."""
    changes = [run.difference[metric] for run in runs]
    return [end for change in changes for end in (change.value, change.low, change.high)]


def draw_bars(
    axes: Axes, runs: Sequence[RunSummary], name: str, title: str, written: Callable[[float | None], str]
) -> None:
    """Draw one cost as a bar a run, with its number behind it."""
    known: list[float | None] = [getattr(run, name) for run in runs]
    values = [float(value or 0) for value in known]
    longest = max(values) or 1.0
    axes.barh(range(len(runs)), values, height=0.56, color=[COLOURS[i % len(COLOURS)] for i in range(len(runs))])
    for at, value in enumerate(known):
        axes.text(values[at] + 0.04 * longest, at, written(value), va="center", fontsize=7.5)
    axes.set_xlim(0, ROOM * longest)
    axes.set_xticks([])
    axes.set_title(title.capitalize(), fontsize=8.5, weight="bold", loc="left", pad=6)


def draw_gains(axes: Axes, runs: Sequence[RunSummary], metric: str) -> None:
    """Draw what each run gained over its base by one metric, with its 95 % interval; better is on the right."""
    axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    for at, run in enumerate(runs):
        change, colour = run.difference[metric], COLOURS[at % len(COLOURS)]
        axes.plot([change.low, change.high], [at, at], color=colour, linewidth=4, alpha=0.4, solid_capstyle="round")
        axes.plot([change.value], [at], marker="o", markersize=5, color=colour)
        axes.annotate(
            f"{score(run.base.get(metric))} → {score(run.tuned.get(metric))}",
            (change.value, at),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
            color=MUTED,
        )
    ends = [0.0, *ends_of(runs, metric)]
    room = 0.22 * ((max(ends) - min(ends)) or 1.0)
    axes.set_xlim(*((min(ends) - room, max(ends) + room)[:: better_side(metric)]))
    axes.locator_params(axis="x", nbins=3)
    axes.xaxis.set_major_formatter(lambda number, at: tick(number))
    axes.set_title(metric.replace("_", " "), fontsize=8.5, weight="bold", loc="left", pad=6)
    axes.set_xlabel("gain over the base, 95 % interval", fontsize=7, color=MUTED, loc="left")


def tick(number: float) -> str:
    """Write a number of an axis with its sign."""
    return "0" if math.isclose(number, 0, abs_tol=1e-12) else f"{number:+.3g}".replace("-", MINUS)


def frame(axes: Axes, names: Sequence[str]) -> None:
    """Name the runs down the side, the first on top, and leave out lines that say nothing."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.65)
    axes.tick_params(length=0, pad=4, colors=MUTED)
    for label in axes.get_yticklabels():
        label.set_color("black")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(LINE)
