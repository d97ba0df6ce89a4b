"""What a page, a Markdown file and the terminal show: sections of tables, pictures and texts, before they are rendered.

Text is plain everywhere; in `Text` and `Bullets` a stretch between backticks is code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from llmtune.records import Difference
from llmtune.report.charts import draw_interval
from llmtune.report.number_format import DASH, chance, count, missing, score, signed
from llmtune.report.verdict import FEWEST_ROWS

Tone = Literal["", "better", "worse", "mixed", "unsure"]
TONES: dict[int, Tone] = {1: "better", -1: "worse", 0: "unsure"}
TOO_FEW = "too few rows"


class Block:
    """A part of a section."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table; its note (small print below the text) and picture are for pages only."""

    text: str = ""
    tone: Tone = ""
    note: str = ""
    code: bool = False
    picture: Markup | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers are right-aligned, pictures are for pages only."""

    heading: str
    kind: Literal["text", "number", "picture"] = "text"


TableColumns = Sequence[Column | str]
TableRows = list[list[Cell | str]]


@dataclass(frozen=True)
class Table(Block):
    """A table; a plain text is short for a column or cell with that text."""

    columns: TableColumns
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    scroll: bool = False
    """Whether a page shows it in a box of limited height."""

    @property
    def heads(self) -> list[Column]:
        """The columns, each with its kind."""
        return [column if isinstance(column, Column) else Column(column) for column in self.columns]

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, each with whole cells."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Compared:
    """A metric (or a slice, or a run) of base and tuned model: one row of `difference_table`."""

    name: str
    base: float | None
    tuned: float | None
    difference: Difference | None
    """Tuned minus base; None where only one of them was measured."""
    better: int = 0
    """1 where more is better, -1 where less is, 0 where neither is."""
    note: str = ""

    @property
    def interval(self) -> str:
        """Both ends of the interval with their signs, or why there is none."""
        change = self.difference
        if change is None:
            return DASH
        if not (missing(change.low) or missing(change.high)):
            return f"{signed(change.low)} to {signed(change.high)}"
        return TOO_FEW if change.n < FEWEST_ROWS else DASH

    @property
    def p(self) -> str:
        """The p-value, where there is an interval."""
        change = self.difference
        return DASH if change is None or missing(change.low) or missing(change.high) else chance(change.p)

    @property
    def tone(self) -> Tone:
        """Better or worse where the interval leaves zero out, else unsure; nothing without a difference."""
        change = self.difference
        if change is None:
            return ""
        return TONES[self.better * (1 if change.low > 0 else -1 if change.high < 0 else 0)]

    @property
    def picture(self) -> Markup | None:
        """The interval about zero, if there is one and one side of zero is better."""
        change = self.difference
        if change is None or not self.better or any(map(missing, (change.value, change.low, change.high))):
            return None
        label = f"{self.name}: {signed(change.value)}, 95 % interval {self.interval}"
        return draw_interval(change.value, change.low, change.high, better=self.better, label=label)


def difference_table(
    rows: Sequence[Compared],
    *,
    title: str = "",
    heading: str = "metric",
    base: str | None = "base",
    difference: str = "difference",
    unit: str = "rows",
    code: bool = False,
) -> Table:
    """Return base, tuned, difference, interval, p and number of rows, a row for each of `rows`.

    `heading` names the first column; `base` the column of the other model; None leaves both scores out.
    """
    names = [*([] if base is None else [base, "tuned"]), difference]
    columns = [Column(heading), *(Column(name, "number") for name in names), Column("worse ← 0 → better", "picture")]
    columns += [Column(name, "number") for name in ("95 % interval", "p", unit)]
    cells: TableRows = []
    for row in rows:
        scores = [] if base is None else [score(row.base), score(row.tuned)]
        value, n = (row.difference.value, write_rows(row.difference)) if row.difference else (None, DASH)
        change, picture = Cell(signed(value), row.tone), Cell(picture=row.picture)
        cells.append([Cell(row.name, note=row.note, code=code), *scores, change, picture, row.interval, row.p, n])
    return Table(columns, cells, title)


def write_rows(change: Difference) -> str:
    """Return the number of rows, and of the groups that they are in."""
    return count(change.n) + (f" in {count(change.groups)} groups" if change.groups else "")


@dataclass(frozen=True)
class Heatmap(Block):
    """A matrix as tinted cells: positive values in the colour of what is tuned or right, negative ones in red."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """From -1 to 1; None leaves a cell empty."""
    label: str
    title: str = ""
    down: str = ""
    """What the rows are."""
    across: str = ""
    texts: Sequence[Sequence[str]] = ()
    """The text of a cell: a line or two."""
    tips: Sequence[Sequence[str]] = ()
    """What a pointer on a cell reads."""


@dataclass(frozen=True)
class Shares(Block):
    """Parts of a whole as one bar in colours, with a list of them: name, size as text, share from 0 to 1."""

    parts: Sequence[tuple[str, str, float]]
    title: str = ""


@dataclass(frozen=True)
class Text(Block):
    """A paragraph."""

    text: str
    style: Literal["", "soft", "note"] = ""


@dataclass(frozen=True)
class Bullets(Block):
    """A list of sentences."""

    items: Sequence[str]
    soft: bool = False


@dataclass(frozen=True)
class KeyValues(Block):
    """Names with their values."""

    pairs: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Links(Block):
    """Addresses, each with its text and what is found there."""

    links: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class ModelAnswer:
    """What one model said to a sample."""

    name: str
    text: str
    right: bool = False


@dataclass(frozen=True)
class Sample:
    """A row with its reference and what the models said."""

    prompt_name: str
    prompt: str
    reference_name: str
    reference: str
    answers: Sequence[ModelAnswer]
    chosen: Sequence[ModelAnswer] = ()
    """The likeliest of the possible answers."""
    origin: str = ""


@dataclass(frozen=True)
class SampleList(Block):
    """Rows side by side."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Details(Block):
    """Blocks that are folded away; pages only."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Beside(Block):
    """Blocks in two columns, where the page is wide enough."""

    left: Sequence[Block]
    right: Sequence[Block]


@dataclass(frozen=True)
class Html(Block):
    """A part that only a page can show: a chart, or what its script draws into."""

    markup: Markup


@dataclass(frozen=True)
class VerdictCard:
    """The verdict: the word, as a title, why, how many gates hold, and the one score that says most."""

    word: str
    title: str
    tone: Tone
    reason: str
    gates: str = ""
    gates_tone: Tone = ""
    headline: Compared | None = None
    baseline: str = ""
    """What the headline compares with, if not the base model."""


@dataclass(frozen=True)
class Section:
    """A titled part of a page; one without blocks is not shown."""

    title: str
    blocks: Sequence[Block]
    link: str = ""
    """Its name in the navigation; without it the title."""
    anchor: str = ""
    brief: bool = True
    """Whether Markdown and terminal show it too."""

    @property
    def id(self) -> str:
        """Its anchor, by default made of its title."""
        return self.anchor or "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Page:
    """A whole page, Markdown file or print-out."""

    title: str
    sections: Sequence[Section]
    chips: Sequence[tuple[str, str]] = ()
    """A few facts that say what it is about."""
    lead: str = ""
    verdict: VerdictCard | None = None
    footer: str = ""
    navigation: bool = True
    style: str = ""
    """Further CSS; the page's own variables (`--ink`, `--page`, `--tuned`...) change with light and dark."""
    script: str = ""
    """JavaScript that runs when the page is there; it may not ask for anything: the page forbids it."""
    data: object = None
    """JSON values for the script, which finds them under the id `data`."""
