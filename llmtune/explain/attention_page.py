"""The page of `llmtune explain attention`: any layer and head by choice, as heatmap and as graph, in one file.

Shapes: Q rows (who looks), T columns (what is looked at).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from llmtune.explain.attention_pictures import AXES, SIDES
from llmtune.explain.attention_selection import Seen
from llmtune.explain.attention_summary import MEAN, ROLLOUT, Head, Line, title_of
from llmtune.explain.capture import MASKED, Kind
from llmtune.explain.colours import DIFFERENCE as DIFFERENCE_COLOURS
from llmtune.explain.colours import WEIGHT
from llmtune.explain.html_page import asset, fill, write_page
from llmtune.explain.rollout import Matrix
from llmtune.explain.token_text import label

MOST_NUMBERS = 12_000_000
"""Weights in one page, 2.7 bytes each: 32 MB. Where there are more, heads are left out first."""
FULL = 65535
"""What 1 is written as, in 16 bits: weights are right to 0.00001."""
LEAD = (
    "Each token of a text looks at others to find out what it means here. A row says where one token looks: its "
    "numbers sum to 1, and brighter is stronger. Choose a layer and a head, and point at a cell to read it."
)


def write_attention_page(path: Path, seen: Seen, thresholds: Mapping[Kind, float]) -> Path:
    """Write the page with as many heads as there is room for: of all layers, of the one that is drawn, or of none."""
    wanted = next((room for room in ROOMS if _count(seen, room) <= MOST_NUMBERS), ROOMS[-1])
    kinds = [_describe(seen, kind, thresholds[kind], wanted) for kind in seen.layers]
    data = {
        "kinds": kinds,
        "sides": [{"name": side, "title": SIDES[side] or "weights"} for side in seen.sides],
        "colours": {"weight": WEIGHT, "difference": DIFFERENCE_COLOURS},
        "full": FULL,
    }
    return write_page(
        path,
        title=f"Attention in {seen.subject.name}",
        lead=LEAD,
        body=_body(seen, wanted),
        data=data,
        script=asset("attention.js"),
        style=asset("attention.css"),
    )


@dataclass(frozen=True)
class Room:
    """Of which layers a page has the means, the heads and the rollout: of `all`, of the `drawn` one, or of `none`."""

    means: str
    heads: str
    rollouts: str


ROOMS = (
    Room("all", "all", "all"),
    Room("all", "drawn", "drawn"),
    Room("all", "none", "drawn"),
    Room("drawn", "drawn", "drawn"),
    Room("drawn", "none", "drawn"),
)
"""What a page has, the fuller the better: the first that is small enough, or the last."""


def _channels(seen: Seen, kind: Kind, room: Room) -> Iterator[tuple[int, Head]]:
    """Return the layers and heads that stand in the page."""
    layers = next(iter(seen.sides.values())).layers[kind]
    for number in seen.numbers(kind):
        here = ("all", "drawn") if number == seen.layers[kind] else ("all",)
        if room.means in here:
            yield number, MEAN
        if room.rollouts in here and layers[number].rollout is not None:
            yield number, ROLLOUT
        if room.heads in here and layers[number].heads is not None:
            yield from ((number, head) for head in range(layers[number].count))


def _count(seen: Seen, room: Room) -> int:
    """Return how many weights stand in the page; of masked attention half of them are left out."""
    numbers = 0
    for kind in seen.layers:
        rows, columns = (len(line) for line in seen.lines.of(kind))
        one = rows * (rows + 1) // 2 if kind == MASKED else rows * columns
        numbers += one * sum(1 for _ in _channels(seen, kind, room))
    return len(seen.sides) * numbers


def _describe(seen: Seen, kind: Kind, threshold: float, room: Room) -> dict[str, Any]:
    rows, columns = seen.lines.of(kind)
    channels = list(_channels(seen, kind, room))
    values: dict[str, str] = {}
    for side in seen.sides:
        for layer, head in channels:
            weights_QT = seen.weights(side, kind, layer, head)
            assert weights_QT is not None, "channels are what was kept"
            values[f"{side}/{layer}/{head}"] = pack(weights_QT, masked=kind == MASKED)
    return {
        "name": kind,
        "title": title_of(kind, seen.subject.family),
        "rows": _tokens(rows),
        "columns": _tokens(columns),
        "same": rows is columns,
        "masked": kind == MASKED,
        "axes": AXES[kind],
        "layers": sorted({layer for layer, _ in channels}),
        "heads": seen.heads(kind),
        "shown": {"layer": seen.layers[kind], "head": str(seen.choice.head)},
        "threshold": threshold,
        "values": values,
    }


def pack(weights_QT: Matrix, *, masked: bool) -> str:
    """Write weights as 16-bit numbers, low byte first, in base64: row by row, masked ones up to the diagonal."""
    shown = weights_QT[np.tril_indices(len(weights_QT))] if masked else weights_QT
    rounded = np.rint(np.clip(shown, 0, 1) * FULL).astype("<u2")
    return base64.b64encode(rounded.tobytes()).decode()


def _tokens(line: Line) -> list[dict[str, Any]]:
    return [{"text": label(token), "whole": label(token, 80), "special": token.special} for token in line.tokens]


def _body(seen: Seen, room: Room) -> Markup:
    note = ""
    there = {kind: set(_channels(seen, kind, room)) for kind in seen.layers}
    if not all((number, 0) in there[kind] for kind in seen.layers for number in seen.numbers(kind)):
        some = any((number, 0) in there[kind] for kind, number in seen.layers.items())
        which = "of one layer" if some else "of no layer"
        note = f"The text is long: this page has the heads {which}. --layer names one; a shorter text has room for all."
    return fill("attention.html.jinja", {"note": note})
