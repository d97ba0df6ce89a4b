"""A comparison made ready to be read: every number as text, for the terminal, Markdown and the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.report.metric_info import LOWER_IS_BETTER, NEAREST_TO_ONE, better_side, direction, note
from llmtune.report.number_format import DASH, chance, count, duration, missing, score, signed, size
from llmtune.report.old_charts import interval_chart
from llmtune.report.slice_tables import ranked
from llmtune.report.verdict import FEWEST_ROWS

Facts = Mapping[str, Any]
KINDS = {1: "better", -1: "worse", 0: "unsure"}
COSTS = (
    ("train_seconds", "training", duration),
    ("run_seconds", "whole run", duration),
    ("peak_bytes", "peak memory in training", size),
    ("trainable", "trained parameters", count),
    ("share", "of all parameters", lambda part: DASH if missing(part) else f"{100 * part:.2f} %"),
    ("disk_bytes", "weights on disk", size),
)
"""What a run costs: its name in `compare.json`, for people, and how it is written."""
TONES = {"better": "good", "worse": "bad", "mixed": "mixed"}
LONGEST = 60


def make_view(made: Facts) -> dict[str, Any]:
    """Return what templates and tables show."""
    runs, metrics = made["runs"], ranked(list(dict.fromkeys(name for run in made["runs"] for name in run["tuned"])))
    return {
        "name": made["name"],
        "version": made["llmtune"],
        "methods": made["kind"] == "methods",
        "chips": chips(made),
        "runs": [run["name"] for run in runs],
        "told": [*tell_pairs(made["pairs"]), *tell_costs(runs)],
        "costs": [cost(name, title, written, runs) for name, title, written in COSTS],
        "metrics": [scored(metric, made) for metric in metrics],
        "pairs": [pair(found, metrics, made["task"]) for found in made["pairs"]],
        "gates": [(run["name"], gate) for run in runs for gate in run.get("gates") or []],
        "settings": [
            {"key": one["key"], "values": [shorten(value) for value in one["values"]]} for one in made["settings"]
        ],
        "notes": made["notes"],
        "folders": [(run["name"], run["folder"]) for run in runs],
    }


def chips(made: Facts) -> list[tuple[str, str]]:
    """The few facts that say what is compared."""
    models = list(dict.fromkeys(str(run["model"]) for run in made["runs"] if run["model"]))
    facts = [("task", made["task"]), ("model", ", ".join(models)), ("test rows", count(made["rows"]))]
    return [(name, value) for name, value in facts if value and value != DASH]


def cost(name: str, title: str, written: Any, runs: Sequence[Facts]) -> dict[str, Any]:
    """One row of costs: each run's, and how long its bar is beside that of the largest."""
    values = [run[name] for run in runs]
    largest = max([value for value in values if not missing(value)], default=0) or 1
    cells = [{"text": written(value), "percent": f"{100 * (value or 0) / largest:.1f}"} for value in values]
    return {"title": title, "cells": cells}


def scored(metric: str, made: Facts) -> dict[str, Any]:
    """One metric: each run's score, and what it gained over its base."""
    cells = [score_cell(metric, run) for run in made["runs"]]
    return {"metric": metric, "note": note(metric, made["task"]), "lower": metric in LOWER_IS_BETTER, "cells": cells}


def score_cell(metric: str, run: Facts) -> dict[str, Any]:
    """What one run scores by one metric."""
    change = run["difference"].get(metric) or {"value": None, "interval": (None, None), "n": None}
    return {
        "name": run["name"],
        "base": score(run["base"].get(metric)),
        "tuned": score(run["tuned"].get(metric)),
    } | changed(metric, change)


def changed(metric: str, change: Facts) -> dict[str, Any]:
    """A difference with its interval, as text and as a picture, the better side on the right."""
    low, high = change["interval"]
    known = not (missing(low) or missing(high) or missing(change["value"]))
    text = f"{signed(low)} to {signed(high)}" if known else DASH
    drawn: Any = ""
    if known and metric not in NEAREST_TO_ONE:
        reach = max(abs(low), abs(high), abs(change["value"]))
        words = f"{metric}: {signed(change['value'])}, 95 % interval {text}"
        drawn = interval_chart(change["value"], low, high, reach=reach, better=better_side(metric), label=words)
    return {
        "change": signed(change["value"]),
        "interval": text,
        "p": chance(change.get("p")),
        "n": count(change["n"]),
        "few": not missing(change["n"]) and change["n"] < FEWEST_ROWS,
        "kind": KINDS[direction(metric, (low, high))],
        "picture": drawn,
    }


def pair(found: Facts, metrics: Sequence[str], task: str) -> dict[str, Any]:
    """Two runs: the verdict, and a row a metric."""
    rows = [
        {"metric": metric, "note": note(metric, task), "lower": metric in LOWER_IS_BETTER}
        | changed(metric, found["difference"][metric])
        for metric in metrics
        if metric in found["difference"]
    ]
    return {
        "first": found["first"],
        "second": found["second"],
        "word": found["verdict"]["word"],
        "tone": TONES.get(found["verdict"]["word"], "unsure"),
        "reason": found["verdict"]["reason"],
        "rows": rows,
        "left_out": sorted(found["left_out"].items()),
    }


def tell_pairs(pairs: Sequence[Facts]) -> list[str]:
    """Say of each pair which is better, in one line."""
    words = {
        "better": "{second} is better than {first}.",
        "worse": "{second} is worse than {first}.",
        "mixed": "{second} is better than {first} here and worse there.",
    }
    unknown = "Between {first} and {second} one can’t tell."
    return [
        f"{words.get(one['verdict']['word'], unknown).format(first=one['first'], second=one['second'])} "
        f"{one['verdict']['reason']}"
        for one in pairs
    ]


def tell_costs(runs: Sequence[Facts]) -> list[str]:
    """Say what each run of another method than the first costs beside it."""
    first, *others = runs
    return [told for run in others if run["method"] != first["method"] and (told := tell_cost(first, run))]


def tell_cost(first: Facts, run: Facts) -> str:
    """Say what one run costs beside another, in parts of it."""
    names = {"train_seconds": "training time", "peak_bytes": "peak memory", "trainable": "trained parameters"}
    names["disk_bytes"] = "size on disk"
    parts = [
        f"{ratio_text(run[name], first[name])} {title}"
        for name, title in names.items()
        if not (missing(run[name]) or missing(first[name]) or not first[name])
    ]
    return f"Beside {first['name']}, {run['name']} takes {', '.join(parts)}." if parts else ""


def ratio_text(part: float, whole: float) -> str:
    """A part of a whole: times where it is more, percent where it is less."""
    ratio = part / whole
    return (
        f"{ratio:.1f} times the"
        if ratio >= 1.95
        else f"{100 * ratio:.{2 if ratio < 0.01 else 1 if ratio < 0.1 else 0}f} % of the"
    )


def shorten(value: Any) -> str:
    """A value of a recipe, short enough for a table."""
    text = "none" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
