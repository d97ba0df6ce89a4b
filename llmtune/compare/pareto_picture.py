"""Quality against cost, a point a run: what is on the Pareto front, and what cannot be told from the best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmtune.compare.run_comparison import RunPair, RunSummary
from llmtune.report.metric_info import better_side
from llmtune.report.number_format import score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

AXES = {
    "train_seconds": ("training", "s"),
    "peak_bytes": ("peak memory in training", "B"),
    "trainable": ("trained parameters", ""),
    "disk_bytes": ("weights on disk", "B"),
}
"""Title and unit of each cost."""
BEHIND, ALIKE, FRONT = "#64748b", "#2563c9", "#d9822b"
PLACES = ((5, 3, "left"), (-5, 3, "right"), (5, -10, "left"), (-5, -10, "right"), (5, 14, "left"), (5, -21, "left"))
"""Where a name may stand beside its point: points to the right, points up, and which of its ends is there."""


def draw_pareto(path: Path, runs: Sequence[RunSummary], pairs: Sequence[RunPair], metric: str, settings: Any) -> None:
    """Draw `metric` of each run over each of its costs into `path` with .png and .svg; better is up and to the left."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    side = better_side(metric)
    best = max(runs, key=lambda run: side * run.tuned[metric])
    intervals = dict(find_intervals(best.name, pairs, metric))
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9.6, 7.6), layout="constrained")
        names = [
            name
            for axes, cost in zip(figure.subplots(2, 2, sharey=True).flat, AXES, strict=True)
            for name in _draw_cost(axes, runs, cost, metric, best, intervals)
        ]
        if side < 0:
            figure.axes[0].invert_yaxis()
        figure.suptitle(
            f"{metric.replace('_', ' ')} of the tuned model; thin lines: 95 % interval of its difference "
            f"from {best.name} ({score(best.tuned[metric])}, dashed)\n"
            f"blue: no clear difference from {best.name}; grey: clearly behind; orange: none is better and cheaper",
            fontsize=8.5,
        )
        _place_names(figure, names)
        figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def find_intervals(best: str, pairs: Sequence[RunPair], metric: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield each run with the interval of its `metric` minus that of the run `best`, where there is one."""
    for pair in pairs:
        change = pair.difference.get(metric)
        if best in (pair.first, pair.second) and change is not None and not math.isnan(change.low):
            ends = (change.low, change.high) if pair.first == best else (-change.high, -change.low)
            yield (pair.second if pair.first == best else pair.first), ends


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indexes of the points (cost, quality) that no other is as cheap and as good as, by cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _draw_cost(
    axes: Axes,
    runs: Sequence[RunSummary],
    cost: str,
    metric: str,
    best: RunSummary,
    intervals: Mapping[str, tuple[float, float]],
) -> Iterator[Annotation]:
    """Draw the runs over one of their costs; yields their names, which stand anywhere as yet."""
    from matplotlib.ticker import EngFormatter

    title, unit = AXES[cost]
    known = [run for run in runs if getattr(run, cost)]
    costs = [getattr(run, cost) for run in known]
    level = best.tuned[metric]
    axes.axhline(level, color=ALIKE, linewidth=0.8, linestyle="--", alpha=0.5)
    for run, x in zip(known, costs, strict=True):
        low, high = intervals.get(run.name, (0.0, 0.0))
        colour = ALIKE if low <= 0 <= high else BEHIND
        axes.plot([x, x], [level + low, level + high], color=colour, alpha=0.35)
        axes.plot([x], [run.tuned[metric]], marker="o", markersize=5, color=colour)
        where = (x, run.tuned[metric])
        yield axes.annotate(run.name, where, (0, 0), textcoords="offset points", fontsize=7, color=colour)
    front = find_front([(x, better_side(metric) * run.tuned[metric]) for run, x in zip(known, costs, strict=True)])
    axes.step([costs[i] for i in front], [known[i].tuned[metric] for i in front], where="post", color=FRONT, alpha=0.6)
    if max(costs) > 20 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.margins(x=0.15)
    axes.set(xlabel=title)
    axes.spines["bottom"].set_visible(True)


def _place_names(figure: Figure, names: Sequence[Annotation]) -> None:
    """Move each name to the first of its places where it covers no other name or dot and stays in its picture."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    axes = [cast("Axes", name.axes) for name in names]
    points = [own.transData.transform(name.xy) for own, name in zip(axes, names, strict=True)]
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
