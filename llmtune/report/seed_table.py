"""The scores of several seeds made ready to be read: as a table for the terminal, for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from llmtune.report.metric_info import LOWER_IS_BETTER
from llmtune.report.number_format import missing, score, signed
from llmtune.report.old_charts import svg

if TYPE_CHECKING:
    from rich.table import Table

Facts = Mapping[str, Any]
WIDTH, HEIGHT, MARGIN = 160, 26, 8


def spread_table(seeds: Facts) -> Table:
    """Return a row a metric: the base, mean, standard deviation, lowest, highest, the gain, and each seed's score."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = ", ".join(str(run["seed"]) for run in seeds["runs"])
    table = Table(title=f"seeds {names}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    for heading in ("base", "mean", "deviation", "lowest", "highest", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("each seed", overflow="fold")
    for metric, found in seeds["metrics"].items():
        cells = [score(found[name]) for name in ("base", "mean", "deviation", "lowest", "highest")]
        each = " ".join(map(score, found["scores"]))
        table.add_row(
            metric, *cells, signed(found["gain"]), each, style={"better": "green", "worse": "red"}.get(kind(found))
        )
    return table


def kind(found: Facts) -> str:
    """Say whether the mean is better or worse than the base by more than the spread, or neither."""
    return ("better" if found["better"] else "worse") if found["larger"] else "unsure"


def spread_view(evaluation: Facts | None) -> dict[str, Any] | None:
    """Return what the page and Markdown show: the sentence, the seeds, and a row a metric; None without seeds."""
    seeds = (evaluation or {}).get("seeds")
    if not seeds:
        return None
    return {
        "told": seeds["told"],
        "names": [str(run["seed"]) for run in seeds["runs"]],
        "rows": [row(metric, found) for metric, found in seeds["metrics"].items()],
    }


def row(metric: str, found: Facts) -> dict[str, Any]:
    """Make one metric ready to be read."""
    return {
        "metric": metric,
        "lower": metric in LOWER_IS_BETTER,
        "base": score(found["base"]),
        "mean": score(found["mean"]),
        "deviation": score(found["deviation"]),
        "range": f"{score(found['lowest'])} to {score(found['highest'])}",
        "gain": signed(found["gain"]),
        "each": [score(one) for one in found["scores"]],
        "kind": kind(found),
        "picture": picture(metric, found["base"], found["scores"]),
    }


def picture(metric: str, base: Any, scores: Sequence[Any]) -> Markup:
    """Draw each seed's score as a dot on one line, and the base as a stroke across it."""
    values = [base, *scores]
    if any(missing(value) for value in values) or min(values) == max(values):
        return Markup("")
    low, high = min(values), max(values)

    def at(value: float) -> str:
        return f"{MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / (high - low):.1f}"

    middle = HEIGHT // 2
    parts = [
        Markup('<line class="axis" x1="4" x2="{}" y1="{}" y2="{}"/>').format(WIDTH - 4, middle, middle),
        Markup('<line class="zero" x1="{0}" x2="{0}" y1="3" y2="{1}"><title>base {2}</title></line>').format(
            at(base), HEIGHT - 3, score(base)
        ),
        *(
            Markup(
                '<circle class="dot train" cx="{}" cy="{}" r="4" fill-opacity="0.6"><title>{}</title></circle>'
            ).format(at(value), middle, score(value))
            for value in scores
        ),
    ]
    words = f"{metric}: base {score(base)}, seeds {', '.join(map(score, scores))}"
    return svg(parts, WIDTH, HEIGHT, words)
