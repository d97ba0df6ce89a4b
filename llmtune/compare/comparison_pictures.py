"""Pictures of a comparison: costs and gains of each run, and quality against cost with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmtune.compare.run_comparison import RunPair, RunSummary
from llmtune.display.number_format import DASH, count, duration, missing, score, size
from llmtune.evaluate.metric_info import better_side, rank_metrics
from llmtune.records import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

COSTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "train_seconds": ("training", duration),
    "run_seconds": ("complete run", duration),
    "peak_bytes": ("peak memory in training", size),
    "trainable": ("trained parameters", count),
    "share": ("of all parameters", lambda part: DASH if part is None else f"{100 * part:.2f} %"),
    "disk_bytes": ("weights on disk", size),
    "served_bytes": ("all weights that answers need", size),
    "row_seconds": ("time per answer, one at a time", duration),
    "forgotten": ("forgotten on general text, bits per byte", score),
}
"""Costs of a run by name in `compare.json`: display name and format."""
RATIOS = {
    "train_seconds": "training time",
    "peak_bytes": "peak memory",
    "trainable": "trained parameters",
    "disk_bytes": "size on disk",
}
"""Costs shown relative to the first run."""
COLOURS = ("#2563c9", "#0f9d8a", "#8e5bd0", "#d9822b", "#c2417c", "#64748b")
PANEL_IN, ROW_IN, DPI = 1.9, 0.32, 130
"""Width of a panel and height of a run in inches."""
MOST_SCORES = 2
"""Panels of scores: the most informative metrics."""
ROOM = 1.75
"""Width of a panel in longest bars, with room for the number after the bar."""
SETTINGS: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "ytick.left": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "comparison",
    "text.parse_math": False,
}

Costs = Mapping[str, tuple[str, str]]
AXES: Costs = {
    "train_seconds": ("training", "s"),
    "peak_bytes": ("peak memory in training", "B"),
    "trainable": ("trained parameters", ""),
    "disk_bytes": ("weights on disk", "B"),
}
"""Title and unit of each cost."""
EXPORT_AXES = {"served_bytes": ("all weights", "B"), "row_seconds": ("time per answer", "s")}
"""The same for exports of a run."""
BEHIND, ALIKE, FRONT = "#64748b", "#2563c9", "#d9822b"
PLACES = ((5, 3, "left"), (-5, 3, "right"), (5, -10, "left"), (-5, -10, "right"), (5, 14, "left"), (5, -21, "left"))
"""Positions of a name relative to its point: points to the right, points up, and the aligned end."""


def draw_pareto(
    path: Path, runs: Sequence[RunSummary], pairs: Sequence[RunPair], metric: str, costs: Costs = AXES
) -> None:
    """Draw `metric` of each run over each of its costs into `path` with .png and .svg; better is up and to the left."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    side = better_side(metric)
    best = max(runs, key=lambda run: side * run.tuned[metric])
    intervals = dict(find_intervals(best.name, pairs, metric))
    with mpl.rc_context(SETTINGS):
        rows = len(costs) // 2
        figure = Figure(figsize=(9.6, 3.8 * rows), layout="constrained")
        names = [
            name
            for axes, cost in zip(figure.subplots(rows, 2, sharey=True).flat, costs.items(), strict=True)
            for name in _draw_cost(axes, runs, cost, metric, best, intervals)
        ]
        if side < 0:
            figure.axes[0].invert_yaxis()
        figure.suptitle(
            f"{metric.replace('_', ' ')} of the tuned model; thin lines: 95 % interval of its difference "
            f"from {best.name} ({score(best.tuned[metric])}, dashed)\n"
            f"blue: no clear difference from {best.name}; grey: clearly worse; orange: none is better and cheaper",
            fontsize=8.5,
        )
        _place_names(figure, names)
        _save_picture(figure, path)


def find_intervals(best: str, pairs: Sequence[RunPair], metric: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield each run with the interval of its `metric` minus that of the run `best`, if it has one."""
    for pair in pairs:
        change = pair.difference.get(metric)
        if best in (pair.first, pair.second) and change is not None and not math.isnan(change.low):
            ends = (change.low, change.high) if pair.first == best else (-change.high, -change.low)
            yield (pair.second if pair.first == best else pair.first), ends


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indexes of the points (cost, quality) on the Pareto front, by cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _draw_cost(
    axes: Axes,
    runs: Sequence[RunSummary],
    cost: tuple[str, tuple[str, str]],
    metric: str,
    best: RunSummary,
    intervals: Mapping[str, tuple[float, float]],
) -> Iterator[Annotation]:
    """Draw the runs over one of their costs; yields their names, not yet placed."""
    from matplotlib.ticker import EngFormatter

    key, (title, unit) = cost
    measured_runs = [run for run in runs if getattr(run, key)]
    costs = [getattr(run, key) for run in measured_runs]
    level = best.tuned[metric]
    axes.axhline(level, color=ALIKE, linewidth=0.8, linestyle="--", alpha=0.5)
    for run, x in zip(measured_runs, costs, strict=True):
        low, high = intervals.get(run.name, (0.0, 0.0))
        colour = ALIKE if low <= 0 <= high else BEHIND
        axes.plot([x, x], [level + low, level + high], color=colour, alpha=0.35)
        axes.plot([x], [run.tuned[metric]], marker="o", markersize=5, color=colour)
        where = (x, run.tuned[metric])
        yield axes.annotate(run.name, where, (0, 0), textcoords="offset points", fontsize=7, color=colour)
    front = find_front(
        [(x, better_side(metric) * run.tuned[metric]) for run, x in zip(measured_runs, costs, strict=True)]
    )
    axes.step(
        [costs[i] for i in front], [measured_runs[i].tuned[metric] for i in front], where="post", color=FRONT, alpha=0.6
    )
    if max(costs) > 20 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.margins(x=0.15)
    axes.set(xlabel=title)
    axes.spines["bottom"].set_visible(True)


def _place_names(figure: Figure, names: Sequence[Annotation]) -> None:
    """Move each name to its first position that covers no other name or dot and is inside its picture."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    axes = [cast("Axes", name.axes) for name in names]
    points = [picture.transData.transform(name.xy) for picture, name in zip(axes, names, strict=True)]
    dots = [Bbox([point - 3, point + 3]) for point in points]
    taken: list[Bbox] = []
    for index, name in enumerate(names):
        covered = dots[:index] + dots[index + 1 :]
        for right, up, end in PLACES:
            name.set(position=(right, up), horizontalalignment=end)
            box = name.get_window_extent().padded(3)
            if box.count_overlaps(taken + covered) == 0 and axes[index].bbox.count_contains(box.corners()) == 4:
                break
        taken.append(box)


def draw_comparison(path: Path, runs: Sequence[RunSummary]) -> None:
    """Draw the comparison into `path` with .png and .svg."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    metrics = shown_metrics(runs)
    panels = len(RATIOS) + len(metrics)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(1.2 + PANEL_IN * panels, 0.9 + ROW_IN * len(runs)), layout="constrained")
        first, *others = figure.subplots(1, panels, sharey=True)
        for axes, name in zip([first, *others], [*RATIOS, *metrics], strict=True):
            (draw_gains if name in metrics else draw_bars)(axes, runs, name)
        first.set_yticks(range(len(runs)), [run.name for run in runs])
        first.set_ylim(len(runs) - 0.45, -0.65)
        _save_picture(figure, path)


def shown_metrics(runs: Sequence[RunSummary]) -> list[str]:
    """Return the most informative metrics that have a better side and an interval in every run."""
    metrics = [metric for metric in rank_metrics(runs[0].difference) if better_side(metric)]
    changes = {metric: [run.difference.get(metric) for run in runs] for metric in metrics}

    def is_known(change: Difference | None) -> bool:
        return change is not None and not any(map(missing, (change.value, change.low, change.high)))

    return [metric for metric in metrics if all(map(is_known, changes[metric]))][:MOST_SCORES]


def draw_bars(axes: Axes, runs: Sequence[RunSummary], name: str) -> None:
    """Draw one cost as a bar per run, with its number after it."""
    title, written = COSTS[name]
    values = [getattr(run, name) for run in runs]
    bars = axes.barh(range(len(runs)), [value or 0 for value in values], height=0.56, color=COLOURS)
    axes.bar_label(bars, [written(value) for value in values], padding=3, fontsize=7.5)
    axes.set(title=title.capitalize(), xticks=[], xlim=(0, ROOM * (max(value or 0 for value in values) or 1)))


def draw_gains(axes: Axes, runs: Sequence[RunSummary], metric: str) -> None:
    """Draw each run's gain over its base by one metric, with its 95 % interval; better is on the right."""
    axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    for at, run in enumerate(runs):
        change, colour = run.difference[metric], COLOURS[at % len(COLOURS)]
        axes.plot([change.low, change.high], [at, at], color=colour, linewidth=4, alpha=0.4, solid_capstyle="round")
        axes.plot([change.value], [at], marker="o", markersize=5, color=colour)
        scores = f"{score(run.base.get(metric))} → {score(run.tuned.get(metric))}"
        axes.annotate(scores, (change.value, at), (0, 6), textcoords="offset points", ha="center", fontsize=6.5)
    axes.margins(x=0.22)
    axes.locator_params(axis="x", nbins=3)
    axes.set(title=metric.replace("_", " "), xlabel="gain over the base, 95 % interval")
    if better_side(metric) < 0:
        axes.invert_xaxis()


def _save_picture(figure: Figure, path: Path) -> None:
    """Write a picture as .png and .svg, byte for byte reproducible."""
    figure.savefig(path.with_suffix(".png"), dpi=DPI, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
