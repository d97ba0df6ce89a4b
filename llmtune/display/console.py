"""Renders tables, texts and progress on the terminal with rich; omits pictures, small print and collapsed parts.

Without a terminal, `Heartbeat` prints a line whenever nothing was printed for a minute.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from textwrap import fill
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text as RichText

from llmtune.display.blocks import Beside, Block, Bullets, Column, KeyValues, Page, Section, Table, Text
from llmtune.display.number_format import duration
from llmtune.errors import visible
from llmtune.recipe.secrets import environment_secrets, hide_environment

LEAST_TEXT = 12
"""Minimum width of text columns."""
SHORT = 8
"""Cells up to this length, such as `< 0.001`, are not wrapped."""
NO_BREAK = "\u00a0"
STYLES = {"better": "green", "worse": "red"}
BEAT_SECONDS = 60.0
"""Longest silence of a log without a terminal; CI systems end jobs that print nothing for longer."""


T = TypeVar("T")


class VisibleConsole(Console):
    """A console that shows escape codes as text, so data cannot control the terminal, and no environment's secrets."""

    def __init__(self, *, beats: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.beats = beats
        """Whether this process prints a heartbeat: only rank 0 does."""
        self.heartbeat = Heartbeat(self)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, and note the time."""
        self.heartbeat.printed = time.monotonic()
        super().print(*objects, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, and make all control characters visible except rich's own."""
        secrets = environment_secrets()
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else visible(hide_environment(segment.text, secrets))
            yield Segment(text, segment.style, segment.control)


class Heartbeat:
    """Prints what a console's innermost phase does, whenever the console was silent for `BEAT_SECONDS`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.printed = time.monotonic()
        """Time of the last line."""
        self.phases: list[Callable[[], str]] = []
        """Each returns the state of a running phase, the outermost first."""
        self._ended = threading.Event()

    @contextmanager
    def during(self, describe: Callable[[], str]) -> Iterator[None]:
        """Beat during a phase; the thread ends with the outermost one."""
        outermost = not self.phases
        self.phases.append(describe)
        if outermost:
            self.printed, self._ended = time.monotonic(), threading.Event()
            threading.Thread(target=self._beat, args=(self._ended,), daemon=True).start()
        try:
            yield
        finally:
            self.phases.remove(describe)
            if outermost:
                self._ended.set()

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(max(self.printed + BEAT_SECONDS - time.monotonic(), 0.01)):
            running = self.phases[-1:]
            if running and time.monotonic() - self.printed >= BEAT_SECONDS:
                self.console.print(running[0](), highlight=False, markup=False)


@contextmanager
def heartbeat(console: Console, describe: Callable[[], str]) -> Iterator[None]:
    """Let a log without a terminal speak at least once a minute during the block; see `Heartbeat`."""
    if not isinstance(console, VisibleConsole) or console.is_terminal or console.quiet or not console.beats:
        yield
        return
    with console.heartbeat.during(describe):
        yield


@contextmanager
def phase(console: Console, name: str) -> Iterator[None]:
    """Name the work of the block in the heartbeat, with the time since it began."""
    started = time.monotonic()
    with heartbeat(console, lambda: f"{name}: still running after {duration(time.monotonic() - started)}"):
        yield


class LiveProgress(Progress):
    """Bars on a terminal; elsewhere the heartbeat has their counts and the time left."""

    def __init__(self, *columns: ProgressColumn, console: Console, **options: Any) -> None:
        super().__init__(*columns, console=console, disable=not console.is_terminal, **options)
        self._phases = ExitStack()
        self._begun: dict[TaskID, float] = {}

    def start(self) -> None:
        """Start the display, or the heartbeat."""
        super().start()
        self._phases.enter_context(heartbeat(self.console, self.describe))

    def stop(self) -> None:
        """End the display, or the heartbeat."""
        self._phases.close()
        super().stop()

    def add_task(
        self,
        description: str,
        start: bool = True,
        total: float | None = 100.0,
        completed: int = 0,
        visible: bool = True,
        **fields: Any,
    ) -> TaskID:
        """Add a bar; the time left counts from what is `completed` already."""
        number = super().add_task(description, start, total, completed, visible, **fields)
        self._begun[number] = completed
        return number

    def describe(self) -> str:
        """Return the state of the running bar: its counts, the time since it began, and an estimate of the rest."""
        running = [task for task in self.tasks if not task.finished] or self.tasks
        return self._describe_task(running[-1]) if running else "still running"

    def _describe_task(self, task: Task) -> str:
        elapsed, parts = task.elapsed or 0.0, []
        if task.total:
            in_bytes = any(isinstance(column, DownloadColumn) for column in self.columns)
            parts.append(f"{task.percentage:.0f} %" if in_bytes else f"{task.completed:,.0f} of {task.total:,.0f}")
        parts.append(f"{duration(elapsed)} so far")
        done = task.completed - self._begun.get(task.id, 0)
        if task.total and done > 0:
            parts.append(f"about {duration(elapsed * (task.total - task.completed) / done)} left")
        return f"{task.description}: {', '.join(parts)}"


@contextmanager
def spinner(console: Console, text: str) -> Iterator[None]:
    """Show a spinner with the elapsed time on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with LiveProgress(*columns, console=console, transient=True) as bars:
        bars.add_task(text, total=None)
        yield


def track_items(console: Console, items: Sequence[T], text: str) -> Iterator[T]:
    """Yield items one by one, and show progress and remaining time on a terminal."""
    with counting_bars(console) as bars:
        yield from bars.track(items, description=text)


def counting_bars(console: Console) -> LiveProgress:
    """Return progress bars with a counter, and a spinner that moves during long items."""
    what = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return LiveProgress(*what, *times, console=console, transient=True)


def print_columns(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console,
    *,
    numbers: Sequence[str] = (),
    wraps: bool = False,
) -> list[str]:
    """Print a list, one line per row; on a terminal without the last columns that do not fit. Return their headings.

    In a file or a pipe each line is as long as its row, for grep. `wraps` wraps the last column on a terminal instead.
    """
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    shown = len(headings)
    while console.is_terminal and not wraps and shown > 1 and sum(widths[:shown]) + 2 * (shown - 1) > console.width:
        shown -= 1
    for row in (headings, *rows):
        cells = zip(headings[:shown], row, widths, strict=False)
        *first, last = (
            " " * (width - cell_len(cell)) + cell if heading in numbers else cell for heading, cell, width in cells
        )
        start = "".join(cell + " " * (width + 2 - cell_len(cell)) for cell, width in zip(first, widths, strict=False))
        if wraps and console.is_terminal:
            last = fill(last, max(console.width - len(start), LEAST_TEXT)).replace("\n", "\n" + " " * len(start))
        console.print(f"{start}{last}", soft_wrap=True, highlight=False, markup=False)
    return [*headings[shown:]]


def print_page(page: Page, console: Console) -> None:
    """Print the sections of a page that are meant for the terminal too."""
    print_sections(page.sections, console)


def print_sections(sections: Sequence[Section], console: Console) -> None:
    """Print sections, each under its title."""
    for section in sections:
        if section.brief and (shown := list(make_renderables(section.blocks, console.width))):
            console.print(RichText(section.title, style="bold"), *shown, sep="\n")


def print_blocks(blocks: Sequence[Block], console: Console) -> None:
    """Print tables and texts."""
    for shown in make_renderables(blocks, console.width):
        console.print(shown)


def make_renderables(blocks: Sequence[Block], width: int) -> Iterator[RenderableType]:
    """Yield the blocks that the terminal shows, as rich renderables."""
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
                yield from make_renderables([*block.left, *block.right], width)


def make_table(block: Table, width: int) -> RenderableType:
    """Return a table for rich; a row has the colour of its first coloured cell.

    Numbers are never truncated. If the table is too wide, first the gaps shrink, then headings wrap, then names wrap,
    and intervals wrap last. If it still does not fit, each row becomes a line of headings and values.
    """
    shown = [number for number, column in enumerate(block.heads) if column.kind != "picture"]
    cells = [[row[number].text for number in shown] for row in block.cells]
    styles = [STYLES.get(next((cell.tone for cell in row if cell.tone), ""), "") for row in block.cells]
    heads = [block.heads[number] for number in shown]
    fitting = _column_widths(heads, cells, width)
    if fitting is None:
        return _as_lines(block.title, heads, cells, styles, width)
    gap, widths = fitting
    title, padding = escape(block.title) or None, (0, max(gap - 2, 0), 0, min(gap - 1, 1))
    table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=padding)
    for column, column_width in zip(heads, widths, strict=True):
        justify: Literal["left", "right"] = "right" if column.kind == "number" else "left"
        table.add_column(escape(column.heading), justify=justify, width=column_width, overflow="fold")
    for texts, style in zip(cells, styles, strict=True):
        table.add_row(
            *(escape(_folded(text, column_width)) for text, column_width in zip(texts, widths, strict=True)),
            style=style,
        )
    return table


def _folded(text: str, width: int) -> str:
    """Wrap a text between words, or after hyphens and slashes; rich wraps at spaces only."""
    lines = [""]
    for part in re.findall(r"[^\s/-]*[\s/-]*", text) if cell_len(text) > width else [text]:
        if lines[-1] and cell_len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _column_widths(heads: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> tuple[int, list[int]] | None:
    """Return the gap between columns, and their widths; None if even the words of all numbers do not fit."""
    numbers = [column.kind == "number" for column in heads]
    columns = [[column.heading, *texts] for column, texts in zip(heads, zip(*cells, strict=True), strict=False)]
    whole = [max(map(cell_len, texts)) for texts in columns]
    words = [max(cell_len(word) for text in texts for word in _unbroken(text)) for texts in columns]
    uncut = [
        max(cell_len(text) for text in (*_unbroken(heading), *texts)) for heading, *texts in columns
    ]  # only the heading wraps
    folded = [min(LEAST_TEXT, size) for size in whole]
    for gap, sizes, least in (
        *((3, whole, words), (2, whole, words), (1, whole, words), (1, uncut, words), (2, uncut, folded)),
        *((2, words, words), (2, words, folded)),
    ):
        fixed = [size if number else low for size, number, low in zip(sizes, numbers, least, strict=True)]
        spare = width - gap * (len(heads) - 1) - 2 - sum(fixed)  # the rest is padding
        if spare >= 0:
            break
    else:
        return None
    for at in sorted((at for at, number in enumerate(numbers) if not number), key=lambda at: whole[at]):
        more = min(spare, whole[at] - fixed[at])
        fixed[at], spare = fixed[at] + more, spare - more
    return gap, fixed


def _unbroken(text: str) -> list[str]:
    return text.split() if len(text) > SHORT else [text]


def _as_lines(
    title: str, heads: Sequence[Column], cells: Sequence[Sequence[str]], styles: Sequence[str], width: int
) -> RichText:
    """Write each row as its name, then headings with values; lines never break between heading and value."""
    text = RichText(f"{title}\n" if title else "", style="italic")
    for texts, style in zip(cells, styles, strict=True):
        pairs = [f"{column.heading} {value}".strip() for column, value in zip(heads, texts, strict=True) if value]
        joined = "  ".join([texts[0], *(pair.replace(" ", NO_BREAK) for pair in pairs[1:])])
        text.append(fill(joined, width, subsequent_indent="  ").replace(NO_BREAK, " ") + "\n", style=style)
    text.rstrip()
    return text


@contextmanager
def progress_bars(console: Console, amount: ProgressColumn | None = None) -> Iterator[Progress]:
    """Draw progress bars if the output is a terminal, in bytes by default."""
    columns = (TextColumn("{task.description}"), BarColumn(), amount or DownloadColumn(), TimeRemainingColumn())
    with LiveProgress(*columns, console=console, transient=True) as progress:
        yield progress
