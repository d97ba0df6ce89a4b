"""Blocks on the terminal, by rich: tables and texts; pictures, small print and folded parts stay on the pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text as RichText

from llmtune.errors import visible
from llmtune.report.blocks import Beside, Block, Bullets, KeyValues, Page, Section, Table, Text

LONGEST_NAME = 32
"""Names of rows up to this length stay on one line where there is room for the numbers beside them, never broken."""
STYLES = {"better": "green", "worse": "red"}


class VisibleConsole(Console):
    """A console on which the text of rows, models and files cannot steer the terminal: it sees escape codes as text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; what is no control of rich's own is made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def print_page(page: Page, console: Console) -> None:
    """Print the sections of a page that are not for pages alone."""
    print_sections(page.sections, console)


def print_sections(sections: Sequence[Section], console: Console) -> None:
    """Print sections, each under its title."""
    for section in sections:
        if section.brief and (shown := list(render_blocks(section.blocks, console.width))):
            console.print(RichText(section.title, style="bold"), *shown, sep="\n")


def print_blocks(blocks: Sequence[Block], console: Console) -> None:
    """Print tables and texts, one below the other."""
    for shown in render_blocks(blocks, console.width):
        console.print(shown)


def render_blocks(blocks: Sequence[Block], width: int) -> Iterator[RenderableType]:
    """Yield what a terminal has to show of blocks."""
    for block in blocks:
        match block:
            case Table():
                yield make_table(block, width)
            case Text() if block.style != "soft":
                yield RichText(block.text.replace("`", ""), style="yellow" if block.style == "note" else "")
            case Bullets():
                yield from (RichText(item.replace("`", "")) for item in block.items)
            case KeyValues():
                yield from (RichText.assemble((name, "dim"), " ", value) for name, value in block.pairs)
            case Beside():
                yield from render_blocks([*block.left, *block.right], width)


def make_table(block: Table, width: int) -> RichTable:
    """Return a table for rich; a row has the colour of the first of its cells that has one."""
    table = RichTable(title=escape(block.title) or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown = [number for number, column in enumerate(block.heads) if column.kind != "picture"]
    longest = {number: max((len(row[number].text) for row in block.cells), default=0) for number in shown}
    fits = sum(length + 2 for length in longest.values()) <= width
    for number in shown:
        is_number = block.heads[number].kind == "number"
        table.add_column(
            escape(block.heads[number].heading),
            justify="right" if is_number else "left",
            no_wrap=is_number or (number == 0 and fits and longest[number] <= LONGEST_NAME),
            overflow="fold",
        )
    for row in block.cells:
        tone = next((cell.tone for cell in row if cell.tone), "")
        table.add_row(*(escape(row[number].text) for number in shown), style=STYLES.get(tone, ""))
    return table
