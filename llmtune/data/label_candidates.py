"""Columns of a table that may hold the label of a classify set, or its text, judged by their values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from llmtune.data.column_mapping import (
    ANSWER_NAMES,
    FIELD,
    HEADINGS,
    MANY_ROWS,
    Aliases,
    flatten,
    is_text,
    join_columns,
    name_words,
    repeats,
    with_aliases,
)
from llmtune.data.rejected_rows import NO_VALUES, parse_cell
from llmtune.data.row_hash import DATE, plain_value
from llmtune.errors import visible

MOST_CLASSES = 200
ROWS_A_CLASS = 4
"""Fewest rows per class, on average: values of other columns differ from row to row."""
MOST_NUMBERS = 20
"""Most different numbers that are classes, such as ratings; more are amounts or identifiers."""
CLASS_CHARACTERS = 60
SHOWN_CLASSES, SHOWN_CHARACTERS = 3, 30
NUMBER = re.compile(r"[+-]?[\d.,]+", re.ASCII)
LOCAL_DATE = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}([ T]\d\d?:\d\d.*)?", re.ASCII)
NO_CLASSES = frozenset(("id", "uuid", "guid", "nr", "date", "datum", "time", "timestamp", "created", "updated"))
"""Words in the names of columns that count or date rows."""
NO_TEXTS = frozenset(
    ("name", "author", "agent", "user", "customer", "email", "phone", "address", "url", "link", "file")
)
"""Words in the names of columns that are not read with other texts."""
FEWEST_WORDS, UNSPACED_CHARACTERS = 1.5, 4
"""Mean length of a column that is read with other texts: one word is a code."""


@dataclass(frozen=True)
class LabelCandidate:
    """A column whose values may be classes."""

    column: str
    counts: Counter[str]
    """The number of rows of each class."""
    unlabelled: int
    """The number of rows without a value."""

    def __str__(self) -> str:
        """Describe it with its most frequent classes."""
        if len(self.counts) > MOST_NUMBERS and _are_numbers(self.counts):
            return f"{visible(self.column)} (numbers, such as {min(self.counts)})"
        shown = [f"{_shorten_cell(name)} {count:,}" for name, count in self.counts.most_common(SHOWN_CLASSES)]
        more = [f"{len(self.counts) - len(shown):,} more"] if len(self.counts) > len(shown) else []
        empty = [f"{self.unlabelled:,} rows without"] if self.unlabelled else []
        return f"{visible(self.column)} ({len(self.counts):,} classes: {', '.join([*shown, *more, *empty])})"


def find_class_columns(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, str], aliases: Aliases
) -> tuple[dict[str, str], list[LabelCandidate]] | None:
    """Return the columns of text and label, and the candidates for the label if `columns` and names do not decide.

    The user's `columns` win. All texts are joined, unless a second text makes pairs. None without label or text.
    """
    names = dict.fromkeys(name for row in rows for name in flatten(row))
    usual = {name: name for name in names} | with_aliases(columns, ("text", "pair", "label"), names, aliases)
    is_stated = "label" in columns or "label" in names
    possible = [one for one in list_candidates(rows, aliases["label"]) if one.column not in columns.values()]
    candidates = [] if is_stated else possible
    label = candidates[0].column if candidates else usual.get("label")
    if "text" in columns or "pair" in usual:
        text = usual.get("text")
    else:
        texts = list_texts(rows, {label or "", *columns.values(), *(one.column for one in possible)})
        text = join_columns(texts) if texts else None
    if label is None or text is None:
        return None
    mapped = {**columns, "text": text, "label": label}
    if len(candidates) < 2 and all(usual.get(ours) == theirs for ours, theirs in mapped.items()):
        return {**columns}, candidates
    return {ours: theirs for ours, theirs in mapped.items() if ours != theirs}, candidates


def list_candidates(rows: Sequence[Mapping[str, object]], usual: Sequence[str]) -> list[LabelCandidate]:
    """Return every column whose values may be classes: few and short, neither dates nor identifiers.

    Columns with a `usual` name for labels come first, even if they have numbers on a scale, then the others in the
    order of the file.
    """
    flat = [flatten(row) for row in rows]
    named = {"label", *usual}
    candidates = []
    for column in dict.fromkeys(name for row in flat for name in row):
        if name_words(column) & (NO_CLASSES | HEADINGS):
            continue
        cells = [list(_candidate_names(row.get(column))) for row in flat]
        counts = Counter(name for names in cells for name in names)
        if _are_classes(counts) or (name_words(column) & named and _are_numbers(counts)):
            candidates.append(LabelCandidate(column, counts, cells.count([])))
    return sorted(candidates, key=lambda one: not name_words(one.column) & named)


def _candidate_names(cell: object) -> Iterator[str]:
    """Yield the classes in a cell; several in a list."""
    value = parse_cell(cell)
    for item in value if isinstance(value, list) else [value]:
        if (name := plain_value(item)) and name not in NO_VALUES:
            yield name


def _are_classes(counts: Counter[str]) -> bool:
    names = [*counts]
    if not 2 <= len(names) <= min(MOST_CLASSES, counts.total() / ROWS_A_CLASS):
        return False
    if any(len(name) > CLASS_CHARACTERS for name in names) or all(map(_is_date, names)):
        return False
    return len(names) <= MOST_NUMBERS or not _are_numbers(counts)


def _are_numbers(counts: Counter[str]) -> bool:
    return len(counts) > 1 and all(map(NUMBER.fullmatch, counts))


def are_identifiers(labels: Sequence[object]) -> bool:
    """Whether most labels are texts that differ from row to row, and no numbers."""
    names = Counter(label for label in labels if isinstance(label, str))
    return names.total() >= MANY_ROWS and 2 * len(names) > len(labels) and not _are_numbers(names)


def _is_date(name: str) -> bool:
    return bool(DATE.fullmatch(name) or LOCAL_DATE.fullmatch(name))


def list_texts(rows: Sequence[Mapping[str, object]], others: Collection[str]) -> list[str]:
    """Return the columns that are the text to classify, in the order of the file; `others` are not among them.

    Several belong together, such as subject and body. Answers are left out: new texts have none yet.
    """
    flat = [flatten(row) for row in rows]
    skipped = {*ANSWER_NAMES, *NO_CLASSES}
    names = dict.fromkeys(name for row in flat for name in row if name not in others)
    texts = [name for name in names if is_text(flat, name) and not name_words(name) & skipped]
    return [name for name in texts if _joins(flat, name)] or texts[:1]


def _joins(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    """Whether a column is read with other texts: a heading, or several words that differ from row to row."""
    words = name_words(column)
    cells = [str(cell) for row in rows if (cell := row.get(column))]
    if words & HEADINGS and not FIELD.search(column):
        return True
    if words & NO_TEXTS or repeats(rows, column) or FIELD.search(column):
        return False
    unspaced = mean(map(len, cells)) > UNSPACED_CHARACTERS and not "".join(cells).isascii()  # as in Japanese
    return unspaced or mean(len(cell.split()) for cell in cells) >= FEWEST_WORDS


def _shorten_cell(name: str) -> str:
    line = visible(" ".join(name.split()))
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"
