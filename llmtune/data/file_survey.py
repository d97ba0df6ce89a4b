"""A look at a file that no recipe names yet: its encoding, columns and copies, and which tasks could read it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from llmtune.data.byte_streams import guess_encoding
from llmtune.data.column_mapping import ALIASES, rename
from llmtune.data.file_readers import NOT_UTF8
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import detect_format, map_columns, parse_row
from llmtune.data.row_hash import hash_content, to_json
from llmtune.data.schema_inference import infer_columns, reads, words
from llmtune.data.sources import LOOKED_AT, local_input
from llmtune.errors import DataError

MOST_ROWS = 5000
"""Rows that are looked at."""
BY_NAME = (
    *("preference", "token-classify", "speech", "qa", "translate", "summarize", "chat", "classify", "completion"),
)
"""Tasks in the order in which a file that fits several is taken for one of them."""
BY_VALUES = ("speech", "qa", "translate", "classify", "chat")
LANGUAGES = re.compile("(ar|cs|da|de|el|en|es|fi|fr|he|hi|hu|it|ja|ko|nl|no|pl|pt|ro|ru|sv|th|tr|uk|vi|zh)([-_]?..)?")
"""Codes that a column of a translation is called by."""
MOST_CLASSES = 50


@dataclass(frozen=True)
class Survey:
    """What a file holds, as far as it was looked at."""

    path: Path
    encoding: str | None
    """None for UTF-8."""
    rows: Sequence[Mapping[str, object]]
    bad: Mapping[str, int]
    """Rows that have no columns to read, by the reason."""
    whole: bool
    """Whether all of its rows were looked at."""

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(dict.fromkeys(name for row in self.rows[:LOOKED_AT] for name in row))


@dataclass(frozen=True)
class Reading:
    """A task that reads the file, the columns that have to be mapped for it, and its rows in canonical form."""

    task: str
    columns: Mapping[str, str]
    """Empty where the file's own names are known."""
    rows: Sequence[Mapping[str, object]]
    bad: Mapping[str, int]
    """How many other rows cannot be read, by the reason, the commonest first."""

    @property
    def copies(self) -> int:
        """Rows that say the same as another one."""
        return len(self.rows) - len({hash_content(row) for row in self.rows})


def survey_file(path: Path) -> Survey:
    """Read the first rows of a file.

    Raises DataError where it cannot be read, or holds no row.
    """
    one = local_input(path)
    found = list(islice(one.raw_rows(), MOST_ROWS + 1))
    encoding = None
    if any(isinstance(row, RowError) and row.reason == NOT_UTF8 for _, row in found):
        encoding = guess_encoding(path)
        source = one.source.model_copy(update={"encoding": encoding})
        found = list(islice(replace(one, source=source).raw_rows(), MOST_ROWS + 1))
    rows = [row for _, row in found[:MOST_ROWS] if not isinstance(row, RowError)]
    bad = Counter(row.reason for _, row in found[:MOST_ROWS] if isinstance(row, RowError))
    if not rows:
        raise DataError.of("no row can be read", str(path), str(found[0][1]) if found else "The file is empty.")
    return Survey(path, encoding, rows, bad, len(found) <= MOST_ROWS)


def list_readings(survey: Survey, task: str | None = None) -> list[Reading]:
    """Return the ways in which tasks, or the one that is named, read a file, the likeliest first."""
    named = [one for one in BY_NAME if task in (None, one)]
    first, folder = survey.rows[:LOOKED_AT], survey.path.parent
    readings = [_reading(survey, one, {}) for one in named if reads(first, one, {}, folder)]
    if not readings and not refusals(survey, task):  # names that are known count, even where their values are bad
        readings = [_reading(survey, one, columns) for one, columns in _inferred(survey, task)]
    return [reading for reading in readings if reading.rows]


def refusals(survey: Survey, task: str | None = None) -> list[str]:
    """Return what is wrong with the first row, by each task (or the one that is named) that knows its columns."""
    found = []
    first, folder = survey.rows[:LOOKED_AT], survey.path.parent
    for one in [one for one in BY_NAME if task in (None, one)]:
        with suppress(DataError):
            row_format = detect_format(first, one, {}, None, str(survey.path))
            try:
                parse_row(rename(first[0], map_columns(row_format, first, one, {})), row_format, one, folder)
            except RowError as error:
                found.append(f"as {one}: {error}")
    return found


def _inferred(survey: Survey, task: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    for one in BY_VALUES if task is None else (task,):
        columns = infer_columns(survey.rows[:LOOKED_AT], one, survey.path.parent)
        if columns and (task is not None or _likely(one, columns, survey)):
            yield one, columns


def _likely(task: str, columns: Mapping[str, str], survey: Survey) -> bool:
    """Whether the values speak for a task that the names do not."""
    if task == "translate":
        return all(LANGUAGES.fullmatch(name.lower()) for name in columns.values())
    if task == "classify":
        labels = [str(row.get(columns["label"])) for row in survey.rows]
        has_answers = any(words(name) & {*ALIASES["chat"]["completion"]} for name in survey.columns)
        return not has_answers and len(set(labels)) <= min(MOST_CLASSES, len(labels) // 4)
    return True


def _reading(survey: Survey, task: str, columns: Mapping[str, str]) -> Reading:
    row_format = detect_format(survey.rows[:LOOKED_AT], task, columns, None, str(survey.path))
    mapping = map_columns(row_format, survey.rows[:LOOKED_AT], task, columns)
    rows, bad = [], Counter(survey.bad)
    for row in survey.rows:
        try:
            parsed = parse_row(rename(row, mapping), row_format, task, survey.path.parent)
            to_json(parsed)  # what cannot be kept is bad
            rows.append(parsed)
        except RowError as error:
            bad[error.reason] += 1
    return Reading(task, columns, rows, dict(bad.most_common()))
