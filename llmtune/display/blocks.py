"""Content of reports before rendering to HTML, Markdown or the terminal: sections of tables, pictures and texts.

All text is plain; in `Text` and `Bullets`, text between backticks is code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from llmtune.display.charts import draw_interval
from llmtune.display.number_format import DASH, chance, count, missing, score, signed
from llmtune.records import FEWEST_ROWS, Difference

Tone = Literal["", "better", "worse", "mixed", "unsure"]
TONES: dict[int, Tone] = {1: "better", -1: "worse", 0: "unsure"}
TOO_FEW = "too few rows"


class Block:
    """A part of a section."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table. The note (small print below the text) and the picture appear on HTML pages only."""

    text: str = ""
    tone: Tone = ""
    note: str = ""
    code: bool = False
    picture: Markup | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table. Numbers are right-aligned; pictures appear on HTML pages only."""

    heading: str
    kind: Literal["text", "number", "picture"] = "text"


TableColumns = Sequence[Column | str]
TableRows = list[list[Cell | str]]


@dataclass(frozen=True)
class Table(Block):
    """A table; a plain string is short for a column or cell with that text."""

    columns: TableColumns
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    scroll: bool = False
    """Whether an HTML page limits its height and lets it scroll."""

    @property
    def heads(self) -> list[Column]:
        """Return the columns as `Column` objects."""
        return [column if isinstance(column, Column) else Column(column) for column in self.columns]

    @property
    def cells(self) -> list[list[Cell]]:
        """Return the rows as `Cell` objects."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Compared:
    """One row of `difference_table`: a metric (or a slice, or a run) of base and tuned model."""

    name: str
    base: float | None
    tuned: float | None
    difference: Difference | None
    """Tuned minus base; None if only one of them was measured."""
    better: int = 0
    """1 if more is better, -1 if less is better, 0 if neither."""
    note: str = ""

    @property
    def interval(self) -> str:
        """Return both ends of the interval with signs, or the reason why it is missing."""
        change = self.difference
        if change is None:
            return DASH
        if not (missing(change.low) or missing(change.high)):
            return f"{signed(change.low)} to {signed(change.high)}"
        return TOO_FEW if change.n < FEWEST_ROWS else DASH

    @property
    def p(self) -> str:
        """Return the p-value if the interval exists, else a dash."""
        change = self.difference
        return DASH if change is None or missing(change.low) or missing(change.high) else chance(change.p)

    @property
    def tone(self) -> Tone:
        """Return better or worse if the interval excludes zero, else unsure; empty without a difference."""
        change = self.difference
        if change is None:
            return ""
        return TONES[self.better * change.sign]

    @property
    def tone_cell(self) -> Cell:
        """Return the difference with its interval, coloured by its direction."""
        return Cell(f"{signed(self.difference.value if self.difference else None)} ({self.interval})", self.tone)

    @property
    def picture(self) -> Markup | None:
        """Return a picture of the interval around zero; None without an interval or a better side."""
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
    tuned: str = "tuned",
    difference: str = "difference",
    unit: str = "rows",
    code: bool = False,
) -> Table:
    """Return a table of base, tuned, difference, interval, p and number of rows.

    `heading` names the first column, `base` and `tuned` those of the models; if `base` is None, both are omitted.
    """
    names = [*([] if base is None else [base, tuned]), difference]
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
    """Return the number of rows, and of their groups, with the effective number, if rows are grouped."""
    effective = f" (effectively {change.units:.1f})" if change.is_uneven else ""
    return count(change.n) + (f" in {count(change.groups)} groups{effective}" if change.groups else "")


@dataclass(frozen=True)
class Heatmap(Block):
    """A matrix as tinted cells: positive values in the colour for tuned or right, negative values in red."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """From -1 to 1; None leaves a cell empty."""
    label: str
    title: str = ""
    down: str = ""
    """Label of the rows."""
    across: str = ""
    texts: Sequence[Sequence[str]] = ()
    """The text of each cell: one or two lines."""
    tips: Sequence[Sequence[str]] = ()
    """The tooltip of each cell."""


@dataclass(frozen=True)
class Shares(Block):
    """Parts of a total as one coloured bar with a legend: name, size as text, share from 0 to 1."""

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
    """Links: address, text, description."""

    links: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class ModelAnswer:
    """The answer of one model to a sample."""

    name: str
    text: str
    right: bool = False


@dataclass(frozen=True)
class Sample:
    """A row with its reference and the models' answers."""

    prompt_name: str
    prompt: str
    reference_name: str
    reference: str
    answers: Sequence[ModelAnswer]
    chosen: Sequence[ModelAnswer] = ()
    """The likeliest of the possible answers, by model."""
    origin: str = ""
    pictures: Sequence[str] = ()
    """Small copies of the prompt's pictures as data URLs; HTML pages only."""


@dataclass(frozen=True)
class SampleList(Block):
    """Samples with answers side by side."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Details(Block):
    """Collapsed blocks; HTML pages only."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Beside(Block):
    """Blocks in two columns if the page is wide enough."""

    left: Sequence[Block]
    right: Sequence[Block]


@dataclass(frozen=True)
class Html(Block):
    """Markup for HTML pages only: a chart, or an element for the page's script."""

    markup: Markup


@dataclass(frozen=True)
class VerdictCard:
    """The verdict: word, title, reason, number of passed gates, and the most informative score."""

    word: str
    title: str
    tone: Tone
    reason: str
    gates: str = ""
    gates_tone: Tone = ""
    headline: Compared | None = None
    baseline: str = ""
    """Name of the headline's other model, if not the base model."""


@dataclass(frozen=True)
class Section:
    """A titled part of a page; sections without blocks are not shown."""

    title: str
    blocks: Sequence[Block]
    link: str = ""
    """Its name in the navigation, by default the title."""
    anchor: str = ""
    brief: bool = True
    """Whether Markdown and the terminal show it too."""

    @property
    def id(self) -> str:
        """Return its anchor, by default derived from its title."""
        return self.anchor or "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Page:
    """A complete report, to render as HTML, Markdown or terminal output."""

    title: str
    sections: Sequence[Section]
    chips: Sequence[tuple[str, str]] = ()
    """A few identifying facts: (name, value)."""
    lead: str = ""
    verdict: VerdictCard | None = None
    footer: str = ""
    navigation: bool = True
    style: str = ""
    """Additional CSS; the page's variables (`--ink`, `--page`, `--tuned`...) adapt to light and dark mode."""
    script: str = ""
    """JavaScript to run after loading; the page blocks all its network requests."""
    data: object = None
    """JSON values for the script, in the element with the id `data`."""
