"""A comparison as one picture, PNG and SVG: what each run cost as bars, what it gained over its base with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.report.metric_info import better_side
from llmtune.report.number_format import MINUS, count, duration, missing, score, size
from llmtune.report.slice_tables import ranked

Facts = Mapping[str, Any]
BARS = (
    ("train_seconds", "Training time", duration),
    ("peak_bytes", "Peak memory", size),
    ("trainable", "Trained parameters", count),
    ("disk_bytes", "Weights on disk", size),
)
COLOURS = ("#2563c9", "#0f9d8a", "#8e5bd0", "#d9822b", "#c2417c", "#64748b")
MUTED, LINE = "#5c6470", "#d5d9df"
PANEL_IN, ROW_IN, LETTER_IN, DPI = 1.85, 0.3, 0.075, 130
"""Width of a panel, height of a run and width of a letter in inches."""
MOST_SCORES = 2
"""Panels of scores: the metrics that say most."""
ROOM = 1.75
"""Of the longest bar: the width of a panel, for the number behind the bar."""


def draw_comparison(path: Path, made: Facts) -> list[Path]:
    """Draw the comparison into `path` with .png and .svg."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = made["runs"]
    metrics = shown_metrics(runs)
    panels = len(BARS) + len(metrics)
    left = LETTER_IN * max(len(run["name"]) for run in runs) + 0.25
    width, tall = left + panels * PANEL_IN + 0.1, ROW_IN * len(runs)
    height = tall + 0.95
    settings: Any = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "comparison", "text.parse_math": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        for number in range(panels):
            place = ((left + number * PANEL_IN) / width, 0.5 / height, (PANEL_IN - 0.2) / width, tall / height)
            axes = figure.add_axes(place)
            if number < len(BARS):
                draw_bars(axes, runs, *BARS[number])
            else:
                draw_gains(axes, runs, metrics[number - len(BARS)])
            frame(axes, [run["name"] for run in runs] if number == 0 else [""] * len(runs))
        paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=DPI, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def shown_metrics(runs: Sequence[Facts]) -> list[str]:
    """Return the metrics that say most and have a better side, of those that every run has with an interval."""
    found = [
        metric
        for metric in ranked(list(runs[0]["difference"]))
        if better_side(metric) and not any(missing(end) for run in runs for end in gain(run, metric))
    ]
    return found[:MOST_SCORES]


def gain(run: Facts, metric: str) -> tuple[Any, Any, Any]:
    """Return the gain over the base, and the ends of its interval; missing where there are none."""
    change = run["difference"].get(metric) or {"value": None, "interval": (None, None)}
    return (change["value"], *change["interval"])


def draw_bars(axes: Any, runs: Sequence[Facts], name: str, title: str, written: Any) -> None:
    """Draw one cost as a bar a run, with its number behind it."""
    values = [0.0 if missing(run[name]) else float(run[name]) for run in runs]
    longest = max(values) or 1.0
    axes.barh(range(len(runs)), values, height=0.56, color=[COLOURS[i % len(COLOURS)] for i in range(len(runs))])
    for at, run in enumerate(runs):
        axes.text(values[at] + 0.04 * longest, at, written(run[name]), va="center", fontsize=7.5)
    axes.set_xlim(0, ROOM * longest)
    axes.set_xticks([])
    axes.set_title(title, fontsize=8.5, weight="bold", loc="left", pad=6)


def draw_gains(axes: Any, runs: Sequence[Facts], metric: str) -> None:
    """Draw what each run gained over its base by one metric, with its 95 % interval; better is on the right."""
    side = better_side(metric)
    axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    for at, run in enumerate(runs):
        value, low, high = gain(run, metric)
        colour = COLOURS[at % len(COLOURS)]
        axes.plot([low, high], [at, at], color=colour, linewidth=4, alpha=0.4, solid_capstyle="round")
        axes.plot([value], [at], marker="o", markersize=5, color=colour)
        axes.annotate(
            f"{score(run['base'].get(metric))} → {score(run['tuned'].get(metric))}",
            (value, at),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
            color=MUTED,
        )
    ends = [0.0, *(end for run in runs for end in gain(run, metric))]
    room = 0.22 * ((max(ends) - min(ends)) or 1.0)
    axes.set_xlim(*((min(ends) - room, max(ends) + room)[::side]))
    axes.locator_params(axis="x", nbins=3)
    axes.xaxis.set_major_formatter(lambda number, at: tick(number))
    axes.set_title(metric.replace("_", " "), fontsize=8.5, weight="bold", loc="left", pad=6)
    axes.set_xlabel("gain over the base, 95 % interval", fontsize=7, color=MUTED, loc="left")


def tick(number: float) -> str:
    """Write a number of an axis with its sign."""
    return "0" if math.isclose(number, 0, abs_tol=1e-12) else f"{number:+.3g}".replace("-", MINUS)


def frame(axes: Any, names: Sequence[str]) -> None:
    """Name the runs down the side, the first on top, and leave out lines that say nothing."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.65)
    axes.tick_params(length=0, pad=4, colors=MUTED)
    for label in axes.get_yticklabels():
        label.set_color("black")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(LINE)
