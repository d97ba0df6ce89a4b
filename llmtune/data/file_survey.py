"""A look at files for `llmtune init`: encoding, columns and copies, tasks that read them, rows that look wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from llmtune.data.byte_streams import GUESSED_BYTES, guess_encoding, open_bytes
from llmtune.data.column_mapping import ANSWER_NAMES, find, flatten, infer_columns, name_words, rename
from llmtune.data.contamination import ANSWERS
from llmtune.data.message_fields import CONTENT_KEYS, first_key, is_message, propose_roles, read_turns
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import check_mapped, detect_format, map_columns, parse_row, reads_rows
from llmtune.data.row_hash import hash_content, iterate_strings, row_json
from llmtune.data.sources import LOOKED_AT, Input, find_files, local_input
from llmtune.errors import DataError
from llmtune.recipe.data_section import Source
from llmtune.recipe.task_facts import TASK_FACTS

MOST_ROWS = 5000
"""Rows that are looked at."""
BY_NAME = dict.fromkeys(
    (
        *("preference", "token-classify", "speech", "qa", "translate", "summarize", "chat", "classify", "completion"),
        *TASK_FACTS,
    )
)
"""Tasks in the order in which a file that fits several is taken for one of them."""
BY_VALUES = ("speech", "qa", "translate", "classify", "chat")
LANGUAGES = re.compile("(ar|cs|da|de|el|en|es|fi|fr|he|hi|hu|it|ja|ko|nl|no|pl|pt|ro|ru|sv|th|tr|uk|vi|zh)([-_]?..)?")
"""Codes that a column of a translation is called by."""
MOST_CLASSES = 50
Roles = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Survey:
    """What a file, or all files of a folder or a glob, hold, as far as they were looked at."""

    path: str
    """As it was named."""
    files: Sequence[Path]
    encoding: str | None
    """None for UTF-8."""
    rows: Sequence[Mapping[str, object]]
    folders: Sequence[Path]
    """By row, the folder of its file."""
    bad: Mapping[str, int]
    """Rows that have no columns to read, by the reason."""
    whole: bool
    """Whether all of its rows were looked at."""

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns, and of keys within them."""
        return list(dict.fromkeys(name for row in self.rows[:LOOKED_AT] for name in flatten(row)))

    @property
    def first(self) -> Sequence[Mapping[str, object]]:
        """The rows by which the format is detected."""
        return self.rows[:LOOKED_AT]


@dataclass(frozen=True)
class Reading:
    """A task that reads the file, the columns and roles to map for it, and its rows in canonical form."""

    task: str
    columns: Mapping[str, str]
    """Empty where the file's own names are known."""
    roles: Roles
    rows: Sequence[Mapping[str, object]]
    bad: Mapping[str, int]
    """How many other rows cannot be read, by the reason, the commonest first."""

    @property
    def copies(self) -> int:
        """Rows that say the same as another one."""
        return len(self.rows) - len({hash_content(row) for row in self.rows})


def survey_files(path: str) -> Survey:
    """Read the first rows of a file, or of the files of a folder or a glob.

    Raises DataError where one cannot be read, or none holds a row.
    """
    inputs = [local_input(file) for file in find_files(Source(path=path), "llmtune init")]
    encoding = _encoding(inputs)
    if encoding:
        inputs = [replace(one, source=one.source.model_copy(update={"encoding": encoding})) for one in inputs]
    rows_in = ((one.folder or Path(), row) for one in inputs for row in one.raw_rows())
    found = list(islice(rows_in, MOST_ROWS + 1))
    good = [(row, folder) for folder, (_, row) in found[:MOST_ROWS] if not isinstance(row, RowError)]
    bad = [error for _, (_, error) in found[:MOST_ROWS] if isinstance(error, RowError)]
    if not good:
        raise DataError.of("no row can be read", path, str(bad[0]) if bad else "The file is empty.")
    files = [one.path for one in inputs if isinstance(one.path, Path)]
    rows, folders = zip(*good, strict=True)
    return Survey(path, files, encoding, rows, folders, Counter(error.reason for error in bad), len(found) <= MOST_ROWS)


def _encoding(inputs: Sequence[Input]) -> str | None:
    """Return the encoding of files that are not UTF-8; raises DataError if only some of a folder's files are not."""
    guessed = {one.name: guess_encoding(one.path) for one in inputs if one.path and one.container != "parquet"}
    found = {name: encoding for name, encoding in guessed.items() if encoding}
    others = [one for one in inputs if one.path and not guessed.get(one.name) and not _is_ascii(one)]
    if found and others:
        name, encoding = next(iter(found.items()))
        what = f"this file is {encoding}, and {others[0].name} is UTF-8: one encoding is expected"
        raise DataError.of(what, name, "Save it as UTF-8.")
    return next(iter(found.values()), None)


def _is_ascii(one: Input) -> bool:
    """Whether a file reads the same in every encoding."""
    if one.path is None or one.container == "parquet":
        return False
    with open_bytes(one.path) as stream:
        return stream.read(GUESSED_BYTES).isascii()


def list_readings(survey: Survey, task: str | None = None, columns: Mapping[str, str] | None = None) -> list[Reading]:
    """Return the ways in which tasks, or the one that is named, read a file, the likeliest first.

    `columns` are those that the user maps; raises DataError where the file does not have them.
    """
    columns = columns or {}
    check_mapped(columns, survey.first, survey.path)
    named = [one for one in BY_NAME if task in (None, one)]
    readings = [
        _reading(survey, one, columns) for one in named if reads_rows(survey.first, one, columns, survey.folders[0])
    ]
    if not readings and task in (None, "chat"):
        readings = list(_conversations(survey, columns))
    if not readings and not columns and not refusals(survey, task):  # known names count, even where values are bad
        readings = [_reading(survey, one, columns) for one, columns in _inferred(survey, task)]
    return [reading for reading in readings if reading.rows]


def refusals(survey: Survey, task: str | None = None, columns: Mapping[str, str] | None = None) -> list[str]:
    """Return what is wrong with the first row, by each task (or the one that is named) that knows its columns."""
    found = []
    first, columns = survey.first, columns or {}
    for one in [one for one in BY_NAME if task in (None, one)]:
        with suppress(DataError):
            row_format = detect_format(first, one, columns, None, survey.path)
            named = rename(first[0], map_columns(row_format, first, one, columns))
            try:
                parse_row(named, row_format, one, survey.folders[0])
            except RowError as error:
                found.append(f"as {one}: {error}")
    return found


def _conversations(survey: Survey, columns: Mapping[str, str]) -> Iterator[Reading]:
    """Read messages that lie within another column, or whose roles have other names."""
    paths = [columns["messages"]] if "messages" in columns else [] if columns else survey.columns
    for path in paths:
        conversations = [read_turns(find(row, path)) for row in survey.rows]
        turns = [turn for turns in conversations[:LOOKED_AT] for turn in turns]
        if not turns or not all(is_message(one) and _has_content(one) for one in turns):
            continue
        known = path in ("messages", "conversations")
        reading = _reading(survey, "chat", {} if known else {"messages": path}, propose_roles(conversations))
        if len(reading.rows) >= sum(map(bool, conversations)) / 2:
            yield reading


def _has_content(turn: object) -> bool:
    return isinstance(turn, dict) and ("tool_calls" in turn or first_key(turn, CONTENT_KEYS) is not None)


def _inferred(survey: Survey, task: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    for one in BY_VALUES if task is None else (task,):
        columns = infer_columns(survey.first, one)
        reads = columns and reads_rows(survey.first, one, columns, survey.folders[0])
        if columns and reads and (task is not None or _likely(columns, survey)):
            yield one, columns


def _likely(columns: Mapping[str, str], survey: Survey) -> bool:
    """Whether the values speak for a task that the names do not."""
    if "source" in columns:
        return all(LANGUAGES.fullmatch(name.lower()) for name in columns.values())
    if "label" in columns:
        labels = [str(find(row, columns["label"])) for row in survey.rows]
        has_answers = any(name_words(name) & {*ANSWER_NAMES} for name in survey.columns)
        return not has_answers and len(set(labels)) <= min(MOST_CLASSES, len(labels) // 4)
    return True


def _reading(survey: Survey, task: str, columns: Mapping[str, str], roles: Roles | None = None) -> Reading:
    row_format = detect_format(survey.first, task, columns, None, survey.path)
    mapping = map_columns(row_format, survey.first, task, columns)
    rows, bad = [], Counter(survey.bad)
    for row, folder in zip(survey.rows, survey.folders, strict=True):
        try:
            parsed = parse_row(rename(row, mapping, roles), row_format, task, folder)
            row_json(parsed)  # what cannot be kept is bad
            rows.append(parsed)
        except RowError as error:
            bad[error.reason] += 1
    return Reading(task, columns, roles or {}, rows, dict(bad.most_common()))


# Rows that can be read and look wrong: one question with several answers, and what spreadsheets write for no value


MOST_QUESTIONS = 100_000
"""Rows that are looked at: the memory of all their questions is bounded."""
LEARNED = (*ANSWERS, "label", "tags")
"""Keys of rows that hold what is learned."""
NO_VALUES = frozenset(
    ("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NULL!", "#NUM!", "N/A", "n/a", "nan", "NaN", "null", "NULL")
)
"""What Excel, pandas and databases write where there is no value."""


def suspicions(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for each kind of suspicious rows; `rows` are canonical, each with its origin, or an empty one.

    Looks at the first MOST_QUESTIONS. Preferences and recordings repeat their prompts: there, only empty values count.
    """
    answered: dict[bytes, tuple[bytes, str]] = {}
    several: set[bytes] = set()
    pair = ("", "")
    empty: Counter[str] = Counter()
    for origin, row in islice(rows, MOST_QUESTIONS):
        asked, answer = _split_answer(row)
        for text in {text for text in map(str.strip, iterate_strings([asked, answer])) if text in NO_VALUES}:
            empty[text] += 1
        if "rejected" in row or "audio" in row or not any(map(str.strip, iterate_strings(asked))):
            continue
        key, said = hash_content({"asked": asked}), hash_content({"answer": answer})
        first, where = answered.setdefault(key, (said, origin))
        if first != said:
            pair = pair if several else (where, origin)
            several.add(key)
    found = [f"rows that hold {text!r}, which stands for no value: {count:,}" for text, count in empty.most_common()]
    if several:
        where = f", first in {pair[0]} and {pair[1]}" if all(pair) else ""
        found.append(f"questions with different answers in different rows: {len(several):,}{where}")
    return found


def _split_answer(row: Mapping[str, Any]) -> tuple[object, object]:
    """Return what a row gives, and what is learned from it."""
    if "messages" in row:
        *before, last = row["messages"]
        return [one["content"] for one in before], {**last, "rest": [row.get(key) for key in LEARNED]}
    return {k: v for k, v in row.items() if k not in LEARNED}, {k: v for k, v in row.items() if k in LEARNED}
