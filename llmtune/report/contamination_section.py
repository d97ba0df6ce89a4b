"""Test rows that stand in the training rows, made ready for page, Markdown and terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.report.number_format import count, share
from llmtune.report.slice_tables import slices

Facts = Mapping[str, Any]
ALL = "all rows"


def overlap(evaluation: Facts | None) -> dict[str, Any] | None:
    """Return what there is to show; None where there are no test rows, or an earlier version evaluated them."""
    found = (evaluation or {}).get("contamination")
    if not evaluation or not found or not found["rows"]:
        return None
    long = found["rows"] - found["short"]
    kinds = [
        ("equal", found["equal"], found["rows"]),
        ("nearly equal (80 % of their word triples in common)", found["near"], found["rows"]),
        ("13 words in a row in common, of rows that are so long", found["shared"], long),
        ("the same words in the same order, of shorter rows", found["worded"], found["short"]),
    ]
    return {
        "told": sentence(found),
        "dropped": [(reason, count(number)) for reason, number in found["dropped"].items()],
        "kinds": [
            {"kind": kind, "rows": count(number), "of": count(whole), "share": share(number, whole)}
            for kind, number, whole in kinds
        ],
        "common": count(found["common"]) if found["common"] else "",
        "examples": [{**one, **{side: place(one[side]) for side in ("test", "train")}} for one in found["examples"]],
        "tables": apart(evaluation, found["scores"]),
        "any": bool(found["overlapping"]),
    }


def sentence(found: Facts) -> str:
    """Say in one sentence or two how many test rows overlap, how, and what was left out before for that reason."""
    rows, number = found["rows"], found["overlapping"]
    parts = [
        f"{count(found[name])} {words}"
        for name, words in (
            ("equal", "equal"),
            ("near", "nearly equal"),
            ("shared", "with 13 words in a row in common"),
            ("worded", "short, with the same words"),
        )
        if found[name]
    ]
    if number:
        verb = "overlaps" if number == 1 else "overlap"
        told = f"{count(number)} of {count(rows)} test rows ({share(number, rows)}) {verb} with a training row: "
        told += ", ".join(parts) + "."
    else:
        how = "equal, nearly equal, 13 words in a row"
        told = f"None of the {count(rows)} test rows overlaps with a training row ({how})."
    if left := sum(found["dropped"].values()):
        were = "row was" if left == 1 else "rows were"
        told += f" {count(left)} other {were} kept out of training for that, or out of validation."
    return told


def apart(evaluation: Facts, scores: Any) -> list[dict[str, Any]]:
    """Return a table a metric, that which says most first: all rows, clean rows, overlapping rows."""
    if not scores:
        return []
    every = {"value": ALL, **{name: evaluation[name] for name in ("base", "tuned", "difference")}}
    (part,) = slices({"slices": {"": [every, *scores]}})
    return list(part["tables"])


def place(origin: Any) -> str:
    """Write where a row stands, without the folder."""
    return str(origin).rsplit("/", 1)[-1]
