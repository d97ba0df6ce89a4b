"""Where the tuning went, as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from llmtune.explain.adapter_page import in_percent, row_of, strongest, summarise

if TYPE_CHECKING:
    from llmtune.explain.adapter import Map

SHOWN = 10
BARS = " ▁▂▃▄▅▆▇█"


def print_moves(found: Map, console: Console) -> None:
    """Print what moved by module and by layer, and which modules moved most."""
    from llmtune.explain.adapter import together

    for sentence in summarise(found):
        console.print(sentence)
    if found.columns:
        table = Table(box=box.SIMPLE_HEAD, title="By module", title_justify="left", title_style="bold")
        table.add_column("module")
        table.add_column("moved", justify="right")
        table.add_column("effective rank", justify="right")
        table.add_column(f"layer {found.rows[0]} to {found.rows[-1]}")
        for column in found.columns:
            moves = found.of_column(column)
            ranks = [move.effective_rank for move in moves if move.effective_rank is not None]
            most = max((move.rank or 0 for move in moves), default=0)
            rank = f"{sum(ranks) / len(ranks):.1f} of {most}" if ranks else "–"
            table.add_row(column, in_percent(together(moves)), rank, sparkline(found, column))
        console.print()
        console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="What moved most", title_justify="left", title_style="bold")
    for name in ("module", "trained", "moved", "effective rank", "‖ΔW‖", "‖W‖"):
        table.add_column(name, justify="left" if name in ("module", "trained") else "right")
    places = {move.module: f"layer {row}  {column}" for (row, column), move in found.cells.items()}
    for move in strongest(found, SHOWN):
        row = row_of(move)
        table.add_row(
            places.get(move.module, move.module),
            row["kind"],
            row["relative"],
            row["rank"],
            row["change"],
            row["weight"],
        )
    console.print()
    console.print(table)


def sparkline(found: Map, column: str) -> str:
    """Draw how far one kind of module moved from layer to layer, against the farthest of all."""
    most = max((move.relative or 0.0 for move in found.cells.values()), default=0.0) or 1.0
    signs = []
    for row in found.rows:
        move = found.cells.get((row, column))
        share = (move.relative or 0.0) / most if move else 0.0
        signs.append(BARS[round(share * (len(BARS) - 1))])
    return "".join(signs)
