"""What the report shows of single classes: how many rows each has, how well it is found, what it is taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.report.number_format import DASH, count, missing, score, share
from llmtune.report.old_charts import matrix_chart

Facts = Mapping[str, Any]
SIDES = ("train", "validation", "test")
MOST_CELLS = 20
"""Classes of a matrix that can still be read."""
MOST_PAIRS = 15


def class_scores(evaluation: Facts | None, task: str | None) -> dict[str, Any] | None:
    """A row a class, of the tuned model, with the base's F1 beside; the most frequent class first."""
    details = (evaluation or {}).get("details") or {}
    tuned = (details.get("tuned") or {}).get("classes")
    if not tuned:
        return None
    base = {row["label"]: row["f1"] for row in (details.get("base") or {}).get("classes") or []}
    entities = task == "token-classify"
    return {
        "title": "Kinds of entities" if entities else "Classes",
        "unit": "entities" if entities else "rows",
        "based": bool(base),
        "rows": [
            {
                "label": str(row["label"]),
                "support": count(row["support"]),
                "absent": not row["support"],
                **{name: score(row[name]) for name in ("precision", "recall", "f1")},
                "base_f1": score(base.get(row["label"])),
                "percent": f"{100 * row['f1']:.1f}" if not missing(row["f1"]) else "0",
            }
            for row in sorted(tuned, key=lambda row: -row["support"])
        ],
    }


def confusion(evaluation: Facts | None) -> dict[str, Any] | None:
    """The tuned model's confusion matrix: as a picture where it can be read, and its largest errors as pairs."""
    details = (evaluation or {}).get("details") or {}
    found = (details.get("tuned") or {}).get("confusion")
    if not found or not found["labels"]:
        return None
    labels, counts = [str(label) for label in found["labels"]], found["counts"]
    rows, right = sum(map(sum, counts)), sum(counts[i][i] for i in range(len(labels)))
    words = f"confusion matrix of {len(labels)} classes: {right} of {rows} rows right"
    readable = len(labels) <= MOST_CELLS
    return {
        "picture": matrix_chart(labels, counts, label=words) if readable else "",
        "pairs": confused_pairs(labels, counts),
        "right": f"{count(right)} of {count(rows)} rows right",
    }


def confused_pairs(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> list[dict[str, str]]:
    """Return the errors that are made most: which class is taken for which, how often, and of how many of its rows."""
    places = [(i, k) for i in range(len(labels)) for k in range(len(labels)) if i != k and counts[i][k]]
    places.sort(key=lambda place: -counts[place[0]][place[1]])
    return [
        {
            "reference": labels[i],
            "predicted": labels[k],
            "rows": count(counts[i][k]),
            "share": share(counts[i][k], sum(counts[i])),
        }
        for i, k in places[:MOST_PAIRS]
    ]


def class_counts(facts: Facts, task: str | None) -> dict[str, Any] | None:
    """How often each class stands on each side, the most frequent first; those never seen in training are marked."""
    classes = facts.get("classes")
    if not classes:
        return None
    trained = {label: sides.get("train") or 0 for label, sides in classes.items()}
    total, most = sum(trained.values()), max(trained.values())
    unit = "entities" if task == "token-classify" else "rows"
    return {
        "unit": unit,
        "sides": SIDES,
        "spread": spread(trained, unit),
        "unseen": [label for label, number in trained.items() if not number],
        "rows": [
            {
                "label": str(label),
                "counts": [count(classes[label].get(side)) for side in SIDES],
                "share": share(number, total) if total else DASH,
                "percent": f"{100 * number / (most or 1):.1f}",
                "unseen": not number,
            }
            for label, number in sorted(trained.items(), key=lambda item: -item[1])
        ],
    }


def spread(trained: Mapping[str, int], unit: str) -> str:
    """Say how uneven the classes are in training."""
    seen = [number for number in trained.values() if number]
    if len(seen) < len(trained):
        return f"{len(trained) - len(seen)} of {len(trained)} have no training {unit}"
    ratio = max(seen) / min(seen)
    return "evenly spread" if ratio < 1.1 else f"the largest has {ratio:.3g} times the {unit} of the smallest"
