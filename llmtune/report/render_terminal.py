"""Blocks on the terminal, by rich: tables and texts; pictures and what is folded away stay on the pages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from llmtune.report.blocks import Beside, Block, Bullets, Code, KeyValues, Page, Table, Text

STYLES = {"better": "green", "worse": "red"}
TEXT_STYLES = {"soft": "dim", "note": "yellow"}


def print_page(page: Page, console: Console) -> None:
    """Print the sections of a page that are not for pages alone."""
    for section in page.sections:
        if section.brief:
            print_blocks(section.blocks, console)


def print_blocks(blocks: Sequence[Block], console: Console) -> None:
    """Print tables and texts, one below the other."""
    for block in blocks:
        if isinstance(block, Table):
            console.print(make_table(block))
        elif isinstance(block, Text | Code):
            style = TEXT_STYLES.get(block.style) if isinstance(block, Text) else None
            console.print(block.text.replace("`", ""), style=style, highlight=False, markup=False)
        elif isinstance(block, Bullets):
            for item in block.items:
                console.print(item.replace("`", ""), highlight=False, markup=False)
        elif isinstance(block, KeyValues):
            if block.title:
                console.print(f"[bold]{escape(block.title)}[/]", highlight=False)
            for name, value in block.pairs:
                console.print(f"[dim]{escape(name)}[/] {escape(value)}", highlight=False)
        elif isinstance(block, Beside):
            print_blocks([*block.left, *block.right], console)


def make_table(block: Table) -> RichTable:
    """Return a table for rich; a row has the colour of the first of its cells that has one."""
    table = RichTable(title=escape(block.title) or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown = [number for number, column in enumerate(block.heads) if column.kind != "picture"]
    for number in shown:
        column = block.heads[number]
        right = column.kind == "number"
        table.add_column(escape(column.heading), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in block.cells:
        tone = next((cell.tone for cell in row if cell.tone), "")
        table.add_row(*(escape(row[number].text) for number in shown), style=STYLES.get(tone, ""))
    return table
