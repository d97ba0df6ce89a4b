"""The page of `llmtune explain adapter`: a heatmap of layers and modules, by choice of measure, and who moved most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.explain.html_page import asset, fill, write_page
from llmtune.report.number_format import count, score

if TYPE_CHECKING:
    from llmtune.explain.adapter import Map
    from llmtune.explain.weight_delta import Move

STRONGEST = 20
LEAD = (
    "How far each part of the model moved in training: the size of what was added to a weight matrix against the size "
    "of the matrix itself. Bright cells are where the tuning went."
)
KINDS = {
    "LoRA": "LoRA",
    "DoRA": "DoRA",
    "whole": "trained whole",
    "tokens": "new rows",
    "bias": "bias",
    "weights": "all weights",
}
MEASURES = (
    ("relative", "moved", "‖ΔW‖ / ‖W‖", "The norm of the change as a share of the norm of the weights."),
    (
        "effective_rank",
        "effective rank",
        "exp H(σ)",
        "How many directions the change really uses: exp of the entropy of its singular values. At most the adapter’s "
        "rank; far below it, a smaller rank would have done.",
    ),
    ("change", "size of the change", "‖ΔW‖", "The Frobenius norm of the change by itself."),
)
"""Key, name, formula and meaning of what a cell can show."""


def write_adapter_page(path: Path, found: Map) -> Path:
    """Write what moved as a page."""
    cells = {f"{row}|{column}": values(move) for (row, column), move in found.cells.items()}
    context = {
        "found": found,
        "summary": summarise(found),
        "measures": MEASURES,
        "strongest": [row_of(move) for move in strongest(found, STRONGEST)],
        "beside": [row_of(move) for move in found.beside],
    }
    return write_page(
        path,
        title=f"Where the tuning went: {found.name}",
        lead=LEAD,
        body=fill("adapter.html.jinja", context),
        data={"rows": found.rows, "columns": found.columns, "cells": cells},
        script=asset("adapter.js"),
        style=asset("adapter.css"),
    )


def values(move: Move) -> dict[str, Any]:
    """Return what the page's script knows of a cell."""
    return {
        "module": move.module,
        "kind": KINDS[move.kind],
        "relative": move.relative,
        "effective_rank": move.effective_rank,
        "rank": move.rank,
        "change": move.change,
        "weight": move.weight,
    }


def row_of(move: Move) -> dict[str, str]:
    """Return a move as a row of a table."""
    effective = "–" if move.effective_rank is None else f"{move.effective_rank:.1f} of {move.rank}"
    return {
        "module": move.module,
        "kind": KINDS[move.kind],
        "relative": in_percent(move.relative),
        "rank": effective,
        "change": score(move.change),
        "weight": score(move.weight),
    }


def in_percent(value: float | None) -> str:
    """Write a share in percent, in three digits."""
    return "–" if value is None else f"{100 * value:.3g} %"


def strongest(found: Map, number: int) -> list[Move]:
    """Return the moves that are largest against their weights."""
    return sorted(found.moves, key=lambda move: -(move.relative or 0.0))[:number]


def summarise(found: Map) -> list[str]:
    """Say in sentences where the tuning went."""
    from llmtune.explain.adapter import together

    moved = together(found.moves)
    if not moved:
        return ["Nothing moved: the adapter adds nothing to the weights."]
    what = "The weights" if found.method == "full" else f"The {len(found.moves)} modules that were trained"
    told = [f"{what} moved by {in_percent(moved)} of their norm, taken together."]
    if found.rows:
        rows = sorted(found.rows, key=lambda row: -(together(found.of_row(row)) or 0.0))
        columns = sorted(found.columns, key=lambda column: -(together(found.of_column(column)) or 0.0))
        spans = []
        if len(rows) > 1:
            ends = [f"layer {row} ({in_percent(together(found.of_row(row)))})" for row in (rows[0], rows[-1])]
            spans.append(f"by layer most in {ends[0]} and least in {ends[1]}")
        if len(columns) > 1:
            ends = [f"{name} ({in_percent(together(found.of_column(name)))})" for name in (columns[0], columns[-1])]
            spans.append(f"by module most in {ends[0]} and least in {ends[1]}")
        if spans:
            told.append(f"B{'; '.join(spans)[1:]}.")
        (row, column), most = max(found.cells.items(), key=lambda cell: cell[1].relative or 0.0)
        told.append(f"The farthest single move is that of {column} in layer {row} ({in_percent(most.relative)}).")
    ranked = [move for move in found.moves if move.effective_rank is not None and move.rank]
    if ranked:
        mean = sum(move.effective_rank or 0.0 for move in ranked) / len(ranked)
        widest = max(move.rank or 0 for move in ranked)
        told.append(f"A change uses {mean:.1f} directions on the mean, of at most {count(widest)}.")
    if found.new_head:
        told.append("The head was made by this run: it moved from a random start, not from trained weights.")
    return told
