"""Positions as tables for the terminal."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.explain.position_encodings import Scheme, doubling, similarity_by_distance, spread
from llmtune.explain.positions import NONE_FOUND, Shown

ROWS, COLUMNS = 40, 6
"""Of a table: those of a longer or a wider one are the first and the last."""
PAIRS, HEADS = 12, 8


def print_positions(shown: Shown, console: Console) -> None:
    """Print what there is, a table each."""
    parts: list[RenderableType] = []
    for scheme in shown.schemes:
        parts += [Text(scheme.title, style="bold"), facts(scheme)]
        if scheme.kind in ("sinusoidal", "learned") and (not shown.name or shown.words):
            parts.append(encoding(scheme, shown))
        elif scheme.kind == "rotary":
            parts.append(waves(scheme, shown.length))
        elif scheme.kind == "bias":
            parts.append(biases(scheme))
        elif scheme.kind == "slopes":
            parts.append(slopes(scheme))
        if scheme.kind not in ("bias", "slopes"):
            parts.append(alike(scheme, shown.length))
        parts.append(Text(""))
    if not shown.schemes:
        parts.append(Text(NONE_FOUND, style="yellow"))
    if shown.tuned:
        parts.append(Text(shown.tuned))
    console.print(Group(*parts), highlight=False)


def facts(scheme: Scheme) -> Text:
    """Return what is known of it, and where it was found."""
    told = ", ".join(f"{name} {value}" for name, value in scheme.facts.items())
    return Text(f"{scheme.name}: {told}" if scheme.name else told, style="dim")


def encoding(scheme: Scheme, shown: Shown) -> RenderableType:
    """Return a row a position: its word, and its numbers with two decimals."""
    table = new_table()
    table.add_column("position", justify="right", style="dim", no_wrap=True)
    if shown.words:
        table.add_column("word", no_wrap=True)
    values = scheme.table(shown.length)
    columns, rows = ends(values.shape[1], COLUMNS), ends(len(values), ROWS)
    for column in columns:
        table.add_column("…" if column is None else str(column), justify="right", no_wrap=True)
    for row in rows:
        at = len(values) - 1 if row is None else row
        head = [str(at), *([shown.words[at]] if shown.words else [])]
        cells = ["…" if row is None or column is None else number(values[row, column]) for column in columns]
        table.add_row(*map(Text, ["…", *([""] if shown.words else []), *cells] if row is None else [*head, *cells]))
    return table


def ends(size: int, most: int) -> list[int | None]:
    """Return the numbers below `size`, or the first and last few of them with None between."""
    if size <= most:
        return list(range(size))
    last = most // 4
    return [*range(most - last), None, *range(size - last, size)]


def number(value: float) -> str:
    """Write it with two decimals; there is no -0.00."""
    return f"{round(float(value), 2) + 0.0:.2f}"


def alike(scheme: Scheme, length: int) -> RenderableType:
    """Return how alike positions are by how far they are apart."""
    found = similarity_by_distance(scheme, length)
    table = new_table()
    table.add_column("apart by", justify="right", style="dim")
    chosen = doubling(len(found))[:11]
    for distance in chosen:
        table.add_column(str(distance), justify="right")
    table.add_row("alike", *(number(found[distance]) for distance in chosen))
    return table


def waves(scheme: Scheme, length: int) -> RenderableType:
    """Return some pairs of dimensions: the angle of a position, the length of the wave, and turns over the text."""
    table = new_table()
    for name in ("pair", "radians a position", "positions a turn", f"turns in {length:,}"):
        table.add_column(name, justify="right")
    for pair in spread(len(scheme.values), PAIRS):
        angle = float(scheme.values[pair])
        turn = f"{2 * np.pi / angle:,.1f}" if angle else "∞"
        table.add_row(str(pair), f"{angle:.6f}", turn, f"{length * angle / (2 * np.pi):,.2f}")
    return table


def biases(scheme: Scheme) -> RenderableType:
    """Return the bias of some heads at some distances; below zero is behind."""
    table = new_table()
    table.add_column("head", justify="right", style="dim")
    ahead = scheme.distances[-1] > 0
    chosen = [d for d in (-64, -16, -4, -1, 0, *((1, 4, 16, 64) if ahead else ())) if d in scheme.distances]
    for distance in chosen:
        table.add_column(f"{distance:+d}" if distance else "0", justify="right")
    for head in range(min(len(scheme.values), HEADS)):
        table.add_row(str(head), *(number(scheme.values[head, scheme.distances.index(d)]) for d in chosen))
    if len(scheme.values) > HEADS:
        table.add_row("…", *[""] * len(chosen))
    return table


def slopes(scheme: Scheme) -> RenderableType:
    """Return what each head takes off its scores for each position of distance."""
    table = new_table()
    table.add_column("head", justify="right", style="dim")
    table.add_column("taken off a position", justify="right")
    for head, slope in enumerate(scheme.values[: 2 * HEADS]):
        table.add_row(str(head), f"{slope:.4f}")
    return table


def new_table() -> Table:
    """Return an empty table without a frame."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
