"""The page of `llmtune explain attention`: any layer and head by choice, as heatmap and as graph, in one file.

Shapes: Q queries (rows), T keys (columns).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import Markup

from llmtune.explain.attention_capture import MASKED, Kind
from llmtune.explain.attention_figures import AXES
from llmtune.explain.attention_summary import MEAN, ROLLOUT, Head, Line, Matrix, title_of
from llmtune.explain.attention_view import TITLES, AttentionView
from llmtune.explain.explanation import asset
from llmtune.explain.figures import DIFFERENCE, WEIGHT
from llmtune.explain.token_text import label
from llmtune.report.blocks import Html, Page, Section, Text

MOST_NUMBERS = 12_000_000
"""Weights in one page, 2.7 bytes each: 32 MB. Where there are more, it has one layer."""
FULL = 65535
"""What 1 is written as, in 16 bits: weights are right to 0.00001."""
LEAD = (
    "Each token of a text looks at others to find out what it means here. A row says where one token looks: its "
    "numbers sum to 1, and brighter is stronger. Choose a layer and a head, and point at a cell to read it."
)


def attention_page(view: AttentionView, tables: Sequence[Section]) -> Page:
    """Return the page with all layers and heads that were kept, or where these are too many with the layer drawn."""
    whole = _count(view) <= MOST_NUMBERS
    maps, graph, overview, reading = (
        Html(Markup(part))  # noqa: S704 - the program's own
        for part in asset("attention.html").split("<!-- section -->\n")
    )
    note = _missing_heads(view, whole)
    return Page(
        f"Attention in {view.target.name}",
        [
            Section("", [maps, *([Text(note, "note")] if note else [])], brief=False),
            Section("Graph", [graph], brief=False),
            Section("All layers and heads", [overview], brief=False),
            *tables,
            Section("How to read it", [reading], brief=False),
        ],
        lead=LEAD,
        navigation=False,
        style=asset("attention.css"),
        script=asset("attention.js"),
        data={
            "kinds": [_describe(view, kind, whole) for kind in view.layers],
            "sides": [{"name": model, "title": TITLES[model] or "weights"} for model in view.maps],
            "colours": {"weight": WEIGHT, "difference": DIFFERENCE},
            "full": FULL,
        },
    )


def _channels(view: AttentionView, kind: Kind, whole: bool) -> Iterator[tuple[int, Head]]:
    """Return the layers and heads that are in the page."""
    layers = next(iter(view.maps.values())).layers[kind]
    for number in view.numbers(kind) if whole else [view.layers[kind]]:
        yield number, MEAN
        if layers[number].rollout is not None:
            yield number, ROLLOUT
        if layers[number].heads is not None:
            yield from ((number, head) for head in range(layers[number].count))


def _count(view: AttentionView) -> int:
    """Return how many weights a whole page has; of masked attention half of them are left out."""
    numbers = 0
    for kind in view.layers:
        rows, columns = (len(line) for line in view.lines.of(kind))
        one = rows * (rows + 1) // 2 if kind == MASKED else rows * columns
        numbers += one * sum(1 for _ in _channels(view, kind, True))
    return len(view.maps) * numbers


def _describe(view: AttentionView, kind: Kind, whole: bool) -> dict[str, object]:
    rows, columns = view.lines.of(kind)
    channels = list(_channels(view, kind, whole))
    values: dict[str, str] = {}
    for model in view.maps:
        for layer, head in channels:
            weights_QT = view.weights(model, kind, layer, head)
            assert weights_QT is not None, "channels are what was kept"
            values[f"{model}/{layer}/{head}"] = pack(weights_QT, masked=kind == MASKED)
    return {
        "name": kind,
        "title": title_of(kind, view.target.family),
        "rows": _tokens(rows),
        "columns": _tokens(columns),
        "same": rows is columns,
        "masked": kind == MASKED,
        "axes": AXES[kind],
        "layers": sorted({layer for layer, _ in channels}),
        "heads": view.heads(kind),
        "shown": {"layer": view.layers[kind], "head": str(view.selection.head)},
        "threshold": view.thresholds[kind],
        "values": values,
    }


def pack(weights_QT: Matrix, *, masked: bool) -> str:
    """Write weights as 16-bit numbers, low byte first, in base64: row by row, masked ones up to the diagonal."""
    shown = weights_QT[np.tril_indices(len(weights_QT))] if masked else weights_QT
    rounded = np.rint(np.clip(shown, 0, 1) * FULL).astype("<u2")
    return base64.b64encode(rounded.tobytes()).decode()


def _tokens(line: Line) -> list[dict[str, object]]:
    return [{"text": label(token), "whole": label(token, 80), "special": token.special} for token in line.tokens]


def _missing_heads(view: AttentionView, whole: bool) -> str:
    there = {kind: set(_channels(view, kind, whole)) for kind in view.layers}
    if all((number, 0) in there[kind] for kind in view.layers for number in view.numbers(kind)):
        return ""
    some = any((number, 0) in there[kind] for kind, number in view.layers.items())
    which = "of one layer" if some else "of no layer"
    return f"The text is long: this page has the heads {which}. --layer names one; a shorter text has room for all."
