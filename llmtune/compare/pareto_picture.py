"""Quality against cost, a point a run: what is on the Pareto front, and what cannot be told from the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.compare.run_comparison import UNKNOWN, Pair, RunSummary
from llmtune.report.metric_info import better_side
from llmtune.report.number_format import score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {
    "train_seconds": ("training, seconds", 1.0),
    "peak_bytes": ("peak memory in training, GB", 1e-9),
    "trainable": ("trained parameters", 1.0),
    "disk_bytes": ("weights on disk, MB", 1e-6),
}
CLEAR, UNCLEAR, FRONT = "#64748b", "#2563c9", "#d9822b"


def draw_pareto(path: Path, runs: Sequence[RunSummary], pairs: Sequence[Pair], metric: str, settings: Any) -> None:
    """Draw `metric` of each run over each of its costs into `path` with .png and .svg; better is up and to the left."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    side = better_side(metric)
    best = max(runs, key=lambda run: side * run.tuned[metric])
    like_best = {best.name, *find_alike(best.name, pairs)}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9.6, 7.6), layout="constrained")
        for axes, cost in zip(figure.subplots(2, 2, sharey=True).flat, AXES, strict=True):
            _draw(axes, runs, cost, metric, like_best)
        if side < 0:
            axes.invert_yaxis()
        figure.suptitle(
            f"{metric.replace('_', ' ')} of the tuned model, with the 95 % interval of its gain\n"
            f"blue: no clear difference from {best.name} ({score(best.tuned[metric])}), the highest; "
            "grey: clearly behind it; orange line: none is better and cheaper",
            fontsize=8.5,
        )
        figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def find_alike(name: str, pairs: Sequence[Pair]) -> set[str]:
    """Return the runs that have no clear difference from the run `name`."""
    near = [pair for pair in pairs if name in (pair.first, pair.second) and pair.verdict.word == UNKNOWN]
    return {pair.second if pair.first == name else pair.first for pair in near}


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indexes of the points (cost, quality) that no other is as cheap and as good as, by cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _draw(axes: Axes, runs: Sequence[RunSummary], cost: str, metric: str, like_best: set[str]) -> None:
    title, unit = AXES[cost]
    side = better_side(metric)
    known = [run for run in runs if getattr(run, cost)]
    costs = [unit * getattr(run, cost) for run in known]
    for run, x in zip(known, costs, strict=True):
        change, y = run.difference[metric], run.tuned[metric]
        colour = UNCLEAR if run.name in like_best else CLEAR
        assert change.low is not None
        assert change.high is not None
        axes.plot([x, x], [y + change.low - change.value, y + change.high - change.value], color=colour, alpha=0.35)
        axes.plot([x], [y], marker="o", markersize=5, color=colour)
        axes.annotate(run.name, (x, y), (4, 3), textcoords="offset points", fontsize=7, color=colour)
    front = find_front([(x, side * run.tuned[metric]) for run, x in zip(known, costs, strict=True)])
    axes.step([costs[i] for i in front], [known[i].tuned[metric] for i in front], where="post", color=FRONT, alpha=0.6)
    if max(costs) > 20 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.15)
    axes.set(xlabel=title)
    axes.spines["bottom"].set_visible(True)
