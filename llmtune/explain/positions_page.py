"""The page of positions: tables and their heatmaps, waves and biases, and how alike positions are."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.explain.html_page import asset, fill, write_page
from llmtune.explain.position_encodings import Array, Scheme, similarity, similarity_by_distance, spread
from llmtune.explain.positions_picture import bias_lines
from llmtune.report.old_charts import line_chart

if TYPE_CHECKING:
    from llmtune.explain.positions import Shown

LEAD = (
    "Attention by itself does not know the order of words: every word looks at all the others at once. Something has "
    "to tell it which word stands where, and how far apart two of them are."
)
MOST = 384
"""Rows and columns of a heatmap; of a larger table some are left out, evenly spread."""
WRITTEN_ROWS, WRITTEN_COLUMNS = 64, 16
"""A table of sines up to this size is written out."""
PAIRS = 24
LABELLED = 24
"""Words that stand beside the rows of a heatmap; there is no room for more."""
MEANINGS = {
    "sinusoidal": "Each row is a position; each wavelength has a column of sines and one of cosines. Short waves tell "
    "neighbours apart, long ones tell near from far. The row is added to the word’s embedding.",
    "learned": "Each row is a position, learned in training like a word’s embedding and added to it. There is no row, "
    "and so no position, behind the last one.",
    "rotary": "Each pair of dimensions of a query and of a key is turned by an angle that grows with the position. "
    "What two words make of one another then depends on how far apart they are, not on where they stand.",
    "bias": "Each head adds a number to its scores, which depends only on how far the word that is looked at lies "
    "behind or ahead. Distances share a number in buckets that grow wider with the distance.",
    "slopes": "Each head takes off its scores what it takes for one position of distance, times the distance: steep "
    "heads look at what is near.",
}


def write_positions_page(path: Path, shown: Shown, none_found: str) -> Path:
    """Write what was found as a page."""
    sections = [section(scheme, shown) for scheme in shown.schemes]
    context = {
        "tuned": shown.tuned,
        "sections": sections,
        "none_found": none_found,
        "labels": shown.words if len(shown.words) <= LABELLED else [],
    }
    return write_page(
        path,
        title=f"Positions: {shown.name}" if shown.name else "Positions: sinusoidal encoding",
        lead=LEAD,
        body=fill("positions.html.jinja", context),
        data={"heatmaps": [maps for one in sections for maps in one["heatmaps"]], "words": shown.words},
        script=asset("positions.js"),
        style=asset("positions.css"),
    )


def section(scheme: Scheme, shown: Shown) -> dict[str, Any]:
    """Return what the template shows of one way to know positions."""
    found: dict[str, Any] = {
        "title": scheme.title,
        "kind": scheme.kind,
        "module": scheme.name,
        "meaning": MEANINGS[scheme.kind],
        "facts": list(scheme.facts.items()),
        "heatmaps": [],
        "alike": "",
        "table": None,
        "waves": [],
        "lines": "",
        "heads": [],
    }
    if scheme.kind in ("bias", "slopes"):
        distances, values = bias_lines(scheme, shown.length)
        lines = [
            (f"h{head % 12}", list(zip(distances, line, strict=True))) for head, line in enumerate(values.tolist())
        ]
        found["lines"] = line_chart(lines, label="what each head adds to its scores by distance", axis="distance")
        found["heads"] = list(range(len(values)))
        return found
    table = scheme.table(shown.length)
    across = "pair" if scheme.kind == "rotary" else "dimension"
    found["heatmaps"] = [heatmap("position", across, table, None if scheme.kind == "learned" else 1.0)]
    if scheme.kind != "rotary":
        found["heatmaps"].append(heatmap("position", "position", similarity(table[spread(len(table), MOST)]), 1.0))
        places = spread(len(table), MOST)
        found["heatmaps"][1] |= {"rows": places, "columns": places, "all": [len(table)] * 2}
    alike = similarity_by_distance(scheme, shown.length)
    points = list(enumerate(alike.tolist()))
    found["alike"] = line_chart(
        [("train", points)], label="how alike positions are, by distance", axis="positions apart"
    )
    if scheme.kind == "rotary":
        found["waves"] = [wave(scheme, pair, shown.length) for pair in spread(len(scheme.values), PAIRS)]
    elif not shown.name and table.shape[0] <= WRITTEN_ROWS and table.shape[1] <= WRITTEN_COLUMNS:
        found["table"] = written(table, shown.words)
    return found


def heatmap(down: str, across: str, table: Array, limit: float | None) -> dict[str, Any]:
    """Return a table as bytes, -127 to 127 for -limit to limit, with the numbers of its rows and columns."""
    rows, columns = spread(table.shape[0], MOST), spread(table.shape[1], MOST)
    part = table[np.ix_(rows, columns)]
    limit = limit or float(np.quantile(np.abs(part), 0.995)) or 1.0
    small = np.clip(np.round(part / limit * 127), -127, 127).astype(np.int8)
    return {
        "down": down,
        "across": across,
        "rows": rows,
        "columns": columns,
        "limit": limit,
        "all": list(table.shape),
        "bytes": base64.b64encode(small.tobytes()).decode("ascii"),
    }


def written(table: Array, words: list[str]) -> list[dict[str, Any]]:
    """Return a table as text, two decimals."""
    return [
        {"position": at, "word": words[at] if words else "", "cells": [f"{round(v, 2) + 0.0:.2f}" for v in row]}
        for at, row in enumerate(table.tolist())
    ]


def wave(scheme: Scheme, pair: int, length: int) -> dict[str, Any]:
    """Return how a pair of dimensions turns."""
    angle = float(scheme.values[pair])
    return {
        "pair": pair,
        "angle": f"{angle:.6f}",
        "turn": f"{2 * np.pi / angle:,.1f}" if angle else "∞",
        "turns": f"{length * angle / (2 * np.pi):,.2f}",
    }
