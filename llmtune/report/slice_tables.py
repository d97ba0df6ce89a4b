"""Flips and slices made ready for the page: which rows changed sides, and how each part of the rows fares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.report.metric_info import HEADLINES, LOWER_IS_BETTER, direction
from llmtune.report.number_format import DASH, chance, count, missing, score, signed
from llmtune.report.sample_view import sample_view
from llmtune.report.verdict import FEWEST_ROWS

Facts = Mapping[str, Any]
KINDS = {1: "better", -1: "worse", 0: "unsure"}
TOO_FEW = "too few rows"


def ranked(metrics: Sequence[str]) -> list[str]:
    """Put metrics in order of how much they say to a person."""
    return sorted(metrics, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))


def flips(evaluation: Facts | None, task: str | None) -> list[dict[str, Any]]:
    """By right-or-wrong metric: how many rows changed sides each way, and some of them."""
    found = (evaluation or {}).get("flips") or {}
    return [
        {
            "metric": metric,
            "rows": count(found[metric]["rows"]),
            "ways": [
                _way("wrong before, right now", "good", "gained", found[metric], evaluation or {}, task),
                _way("right before, wrong now", "bad", "lost", found[metric], evaluation or {}, task),
            ],
        }
        for metric in ranked(list(found))
    ]


def _way(title: str, tone: str, name: str, found: Facts, evaluation: Facts, task: str | None) -> dict[str, Any]:
    shown = [sample_view(row, evaluation, task) for row in found.get(f"{name}_rows") or []]
    return {"title": title, "tone": tone, "count": count(found[name]), "samples": shown, "any": bool(found[name])}


def slices(evaluation: Facts | None) -> list[dict[str, Any]]:
    """By column: a table a metric, that which says most first; a row for each slice."""
    found = (evaluation or {}).get("slices") or {}
    return [
        {"column": column, "tables": [_table(metric, parts) for metric in compared(parts)]}
        for column, parts in found.items()
    ]


def compared(parts: Sequence[Facts]) -> list[str]:
    """Return the metrics that both models have on some slice, that which says most first."""
    return ranked(list(dict.fromkeys(metric for part in parts for metric in part["difference"])))


def _table(metric: str, parts: Sequence[Facts]) -> dict[str, Any]:
    rows = [_row(metric, part) for part in parts if metric in part["difference"]]
    return {"metric": metric, "lower": metric in LOWER_IS_BETTER, "rows": rows}


def _row(metric: str, part: Facts) -> dict[str, Any]:
    change = part["difference"][metric]
    low, high = change["interval"]
    few = change["n"] < FEWEST_ROWS
    known = not (missing(low) or missing(high))
    return {
        "value": part["value"],
        "n": count(change["n"]),
        "base": score(part["base"].get(metric)),
        "tuned": score(part["tuned"].get(metric)),
        "change": signed(change["value"]),
        "interval": f"{signed(low)} to {signed(high)}" if known else TOO_FEW if few else "no interval",
        "p": chance(change["p"]) if known else DASH,
        "kind": KINDS[direction(metric, (low, high))],
    }
