"""Surveys files for `llmtune init`: encoding, columns, copies, tasks that fit, and suspicious rows."""

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

from llmtune.data.byte_streams import WIDE, open_bytes
from llmtune.data.column_mapping import (
    ANSWER_NAMES,
    find,
    flatten,
    infer_columns,
    is_text,
    name_columns,
    name_words,
    names_pictures,
    names_recordings,
    rename,
)
from llmtune.data.encoding_guess import GUESSED_BYTES, guess_encoding
from llmtune.data.file_readers import data_errors
from llmtune.data.label_candidates import LabelCandidate, are_identifiers, find_class_columns
from llmtune.data.message_fields import CONTENT_KEYS, first_key, is_message, propose_roles, read_turns
from llmtune.data.pictures import row_pictures
from llmtune.data.rejected_rows import NO_VALUES, RowError
from llmtune.data.row_formats import check_mapped, detect_format, map_columns, parse_row, reads_rows
from llmtune.data.row_hash import hash_content, iterate_strings, row_json
from llmtune.data.row_kind import AUDIO, KINDS, LABELLED, MESSAGES, PAIRS, RowKind, hash_row, kind_of_row, kind_of_task
from llmtune.data.sources import LOOKED_AT, Input, find_files, local_input
from llmtune.data.written_numbers import read_number
from llmtune.errors import DataError, Problem
from llmtune.recipe.data_section import BINARY, Source
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Row

MOST_ROWS = 5000
"""How many rows are read."""
LANGUAGES = re.compile(
    "(ar|cs|da|de|el|en|es|fi|fr|he|hi|hu|it|ja|ko|nl|no|pl|pt|ro|ru|sv|th|tr|uk|vi|zh)([-_]?..)?"
    "|arabic|chinese|czech|dutch|english|french|german|italian|japanese|korean|polish|portuguese|russian|spanish|turkish"
    "|deutsch|englisch|französisch|italienisch|spanisch|español|inglés|français|anglais|allemand|italiano|inglese"
)
"""Codes and names of languages that name a column of a translation."""
RATED = [name for name, facts in TASK_FACTS.items() if facts.rates_answers]
MOST_CLASSES = 50
LEAST_DELIMITERS = 2
"""A line of a table in a text file has at least so many."""
CELLS = "wrong number of columns"
HEADER = "The first line must have the names of the columns. Remove lines above it; write it if it is missing."
Roles = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Survey:
    """The contents of a file, or of all files of a folder or glob, as far as they were read."""

    path: str
    """The path as the user gave it."""
    files: Mapping[Path, str | None]
    """The encoding of each file; None if it is UTF-8."""
    sources: Sequence[Source]
    """The sources of a recipe that read the files: one, or one per file if their encodings differ."""
    rows: Sequence[Mapping[str, object]]
    row_files: Sequence[Path]
    """The file of each row."""
    bad: Mapping[str, int]
    """Unreadable rows by reason."""
    whole: bool
    """Whether all rows were read."""

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns and of their nested keys."""
        return list(dict.fromkeys(name for row in self.rows[:LOOKED_AT] for name in flatten(row)))

    @property
    def encodings(self) -> str:
        """The encodings of the files, in words."""
        return " and ".join(dict.fromkeys(encoding or "UTF-8" for encoding in self.files.values()))

    @property
    def first(self) -> Sequence[Mapping[str, object]]:
        """The rows used to detect the format."""
        return self.rows[:LOOKED_AT]


@dataclass(frozen=True)
class Reading:
    """A task that can read the file, with the columns and roles to map and the canonical rows."""

    task: str
    columns: Mapping[str, str]
    """Empty if the file's own names are known."""
    roles: Roles
    rows: Sequence[Row]
    bad: Mapping[str, int]
    """The number of unreadable rows by reason, the most frequent first."""
    lost: Mapping[Path, str]
    """Files without a readable row, each with the problem of its first row."""
    candidates: Sequence[LabelCandidate] = ()
    """Columns that may be the label; the reading takes the first. Empty if the label is named."""

    @property
    def copies(self) -> int:
        """The number of rows that repeat another row's content."""
        return len(self.rows) - len({hash_row(row) for row in self.rows})


def survey_files(path: str) -> Survey:
    """Read the first rows of a file, or of the files of a folder or glob.

    Raises DataError if a file cannot be read, or if none of its rows can be read.
    """
    inputs = [local_input(file) for file in find_files(Source(path=path), "llmtune init")]
    inputs = [replace(one, source=_with_encoding(one)) for one in inputs]
    rows_in = ((one, row) for one in inputs for row in one.raw_rows())
    looked_at = list(islice(rows_in, MOST_ROWS + 1))
    good = [(row, one.path) for one, (_, row) in looked_at[:MOST_ROWS] if not isinstance(row, RowError)]
    bad = [(one.path, origin, row) for one, (origin, row) in looked_at[:MOST_ROWS] if isinstance(row, RowError)]
    files = {one.path: one.source.encoding for one in inputs if isinstance(one.path, Path)}
    read = {file for _, file in good}
    first_bad = {
        file: Problem(f"no row can be read: {error}", origin, HEADER if error.reason == CELLS else "")
        for file, origin, error in reversed(bad)
    }
    DataError.collect(problem for file, problem in first_bad.items() if file not in read)
    if not good:
        raise DataError.of("no row can be read", path, "The file is empty.")
    rows, row_files = zip(*good, strict=True)
    _check_tables(inputs, rows, row_files)
    reasons = Counter(error.reason for _, _, error in bad)
    return Survey(path, files, _name_sources(path, inputs), rows, row_files, reasons, len(looked_at) <= MOST_ROWS)


def _check_tables(inputs: Sequence[Input], rows: Sequence[Mapping[str, object]], row_files: Sequence[object]) -> None:
    """Raise DataError for tables that are read as something else: in a text file, or without a header."""
    problems = []
    for one in inputs:
        first = [row for row, file in zip(rows, row_files, strict=True) if file == one.path]
        if one.container == "text" and first and (cells := _count_cells(str(first[0]["text"]))):
            what = f"the file looks like a table: its lines have {cells} cells"
            problems.append(Problem(what, one.name, "End its name with .csv. A .txt file is read as one text."))
        if one.container in ("csv", "excel") and first and (value := _headerless(first)):
            what = f"the first line is a row, not the names of the columns: {value!r} is a value of its column"
            problems.append(Problem(what, one.name, HEADER))
    DataError.collect(problems)


def _count_cells(text: str) -> int:
    """Return the number of cells in each line of a table; 0 if the text is none."""
    lines = [line for line in text.splitlines()[:LOOKED_AT] if line.strip()]
    for delimiter in "\t;":
        numbers = Counter(line.count(delimiter) for line in lines)
        number, lines_of_it = numbers.most_common(1)[0] if numbers else (0, 0)
        if number >= LEAST_DELIMITERS and len(lines) > 2 and lines_of_it >= 0.9 * len(lines):
            return number + 1
    return 0


def _headerless(rows: Sequence[Mapping[str, object]]) -> str | None:
    """Return a column's name that is one of its values, if most names are values or numbers."""
    names = [*rows[0]]
    values = [name for name in names if 0 < sum(row.get(name) == name for row in rows) < len(rows)]
    numbers = [name for name in names if name not in values and read_number(name) is not None]
    return values[0] if values and len(values) + len(numbers) >= max(2, len(names) / 2) else None


def _with_encoding(one: Input) -> Source:
    """Return the source of a file with its encoding, if it is not UTF-8."""
    if one.path is None or one.container in BINARY:
        return one.source
    with data_errors(one.name):
        return one.source.model_copy(update={"encoding": guess_encoding(one.path)})


def _name_sources(path: str, inputs: Sequence[Input]) -> list[Source]:
    """Return one source for all files, or one per file if no encoding reads them all."""
    encodings = {one.source.encoding for one in inputs if one.source.encoding or not _is_ascii(one)}
    if any(str(encoding).startswith(WIDE) for encoding in encodings):  # it does not read ASCII
        encodings |= {one.source.encoding for one in inputs}
    if len(encodings) > 1:
        return [one.source for one in inputs]
    return [Source(path=path, encoding=next(iter(encodings), None))]


def _is_ascii(one: Input) -> bool:
    """Whether a file starts with ASCII only, so its encoding does not matter."""
    if one.path is None or one.container in BINARY:
        return True
    with open_bytes(one.path) as stream:
        return stream.read(GUESSED_BYTES).isascii()


def list_readings(survey: Survey, task: str | None = None, columns: Mapping[str, str] | None = None) -> list[Reading]:
    """Return how the tasks, or the given one, can read a file, the most likely reading first.

    `columns` is the user's mapping. Raises DataError if the file lacks one of its columns.
    """
    columns = columns or {}
    check_mapped(columns, survey.first, survey.path)
    named = [kind.tasks[0] for kind in KINDS] if task is None else [task]
    folder = survey.row_files[0].parent
    readings = [_reading(survey, one, columns) for one in named if reads_rows(survey.first, one, columns, folder)]
    if task is None and not columns and any(names_recordings(survey.rows, name) for name in survey.columns):
        recordings = [one for one in readings if kind_of_task(one.task) is AUDIO]  # file names are no texts to learn
        return recordings or [_reading(survey, one, columns) for one, columns in _inferred(survey, AUDIO.tasks[0])]
    if not columns and (task is None or kind_of_task(task) is MESSAGES):
        readings = [*_pictured(survey, task or MESSAGES.tasks[0], readings), *readings]
    if not readings and (task is None or kind_of_task(task) is MESSAGES):
        readings = list(_conversations(survey, columns, task or MESSAGES.tasks[0]))
    if not readings and not columns and not refusals(survey, task):  # known names count, even if values are bad
        readings = [_reading(survey, one, columns) for one, columns in _inferred(survey, task)]
    if not readings and task is None and not refusals(survey):  # prompts without answers
        readings = [_reading(survey, one, columns) for one in RATED if reads_rows(survey.first, one, columns, folder)]
    if task is None or kind_of_task(task) is LABELLED:
        readings = _with_classes(survey, readings, columns, task)
    readings = [reading for reading in readings if reading.rows]
    return readings if task is not None else sorted_for_search(readings)


def _pictured(survey: Survey, task: str, others: Sequence[Reading]) -> Iterator[Reading]:
    """Read a table whose file names of pictures have a column of any name, with its last text as the answer."""
    names = [name for name in survey.columns if names_pictures(survey.first, name)]
    texts = [name for name in survey.columns if name not in names and is_text(survey.first, name)]
    if not names or not texts or any(row_pictures(row) for one in others for row in one.rows):
        return
    columns = {"image": names[0], "answer": texts[-1], **({"question": texts[0]} if len(texts) > 1 else {})}
    if reads_rows(survey.first, task, columns, survey.row_files[0].parent):
        yield _reading(survey, task, columns)


def _with_classes(
    survey: Survey, readings: list[Reading], columns: Mapping[str, str], stated: str | None
) -> list[Reading]:
    """Read all texts and find all candidates for the label in the reading of labelled rows, if the rows have any.

    It replaces a reading by the names of single columns, and precedes readings that leave a label out.
    """
    mapped, folder = find_class_columns(survey.rows, columns, LABELLED.aliases), survey.row_files[0].parent
    task, others = stated or LABELLED.tasks[0], [one.task for one in readings]
    if mapped is None or not reads_rows(survey.first, task, mapped[0], folder):
        return readings
    if task not in others and not (stated or _leaves_label_out(survey, others, columns)):
        return readings
    reading = replace(_reading(survey, task, mapped[0]), candidates=mapped[1])
    place = others.index(task) if task in others else 0
    rest = [one for one in readings if one.task != task]
    if not mapped[1] and are_identifiers([LABELLED.label(row) for row in reading.rows]):
        place = len(rest)
    return [*rest[:place], reading, *rest[place:]] if reading.rows else rest


def _leaves_label_out(survey: Survey, tasks: Sequence[str], columns: Mapping[str, str]) -> bool:
    """Whether the rows have no answers to learn, for example for tasks of a text alone, which leave a label out."""
    has_answers = any(name_words(name) & {*ANSWER_NAMES} for name in survey.columns)
    return (
        not has_answers and {*map(kind_of_task, tasks)} <= {PAIRS, MESSAGES} and {*columns} <= {"text", "label", "pair"}
    )


def sorted_for_search(readings: list[Reading]) -> list[Reading]:
    """Put a model that searches before one that ranks, and drop one that would learn from right passages alone.

    Only rankers read graded passages, so pairs and triplets are for search, and graded rows for ranking.
    """
    kept = [one for one in readings if not _lacks_irrelevant(one)]
    tasks = [one.task for one in kept]
    for place, task in enumerate(tasks):
        if (first := TASK_FACTS[task].after) in tasks:
            kept.insert(place, kept.pop(tasks.index(first)))
    return kept


def _lacks_irrelevant(reading: Reading) -> bool:
    """Whether a reranker could not learn from the rows before `data.negatives` mines irrelevant passages."""
    if TASK_FACTS[reading.task].answer_kind != "relevances":
        return False
    return len({relevance for row in reading.rows for relevance in kind_of_row(row).relevances(row)}) == 1


def refusals(survey: Survey, task: str | None = None, columns: Mapping[str, str] | None = None) -> list[str]:
    """Return the problem with the first row for each task (or the given one) that knows its columns."""
    problems = []
    first, columns = survey.first, columns or {}
    for one in [kind.tasks[0] for kind in KINDS] if task is None else [task]:
        with suppress(DataError):
            row_format = detect_format(first, one, columns, None, survey.path)
            mapping = map_columns(row_format, first, one, columns)
            try:
                parse_row(rename(first[0], mapping), row_format, one, survey.row_files[0].parent)
            except RowError as error:
                problems.append(f"as {one}: {name_columns(error, mapping)}")
    return problems


def _conversations(survey: Survey, columns: Mapping[str, str], task: str) -> Iterator[Reading]:
    """Read messages nested in another column, or with unknown role names."""
    paths = [columns["messages"]] if "messages" in columns else [] if columns else survey.columns
    for path in paths:
        conversations = [read_turns(find(row, path)) for row in survey.rows]
        turns = [turn for turns in conversations[:LOOKED_AT] for turn in turns]
        if not turns or not all(is_message(one) and _has_content(one) for one in turns):
            continue
        is_standard = path in ("messages", "conversations")
        reading = _reading(survey, task, {} if is_standard else {"messages": path}, propose_roles(conversations))
        if len(reading.rows) >= sum(map(bool, conversations)) / 2:
            yield reading


def _has_content(turn: object) -> bool:
    return isinstance(turn, dict) and ("tool_calls" in turn or first_key(turn, CONTENT_KEYS) is not None)


def _inferred(survey: Survey, task: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    guessed = sorted((kind for kind in KINDS if kind.guessed), key=lambda kind: kind.guessed)
    for one in [kind.tasks[0] for kind in guessed] if task is None else [task]:
        columns = infer_columns(survey.first, TASK_FACTS[one].columns, kind_of_task(one).aliases)
        reads = columns and reads_rows(survey.first, one, columns, survey.row_files[0].parent)
        if columns and reads and (task is not None or _likely(columns, survey)):
            yield one, columns


def _likely(columns: Mapping[str, str], survey: Survey) -> bool:
    """Whether the values support a task that the names do not suggest."""
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
    rows, bad, read, lost = [], Counter(survey.bad), set[Path](), dict[Path, str]()
    for row, file in zip(survey.rows, survey.row_files, strict=True):
        try:
            parsed = parse_row(rename(row, mapping, roles), row_format, task, file.parent)
            row_json(parsed)  # a row that cannot be stored is bad
            rows.append(parsed)
            read.add(file)
        except RowError as error:
            bad[error.reason] += 1
            lost.setdefault(file, str(name_columns(error, mapping)))
    lost = {file: why for file, why in lost.items() if file not in read}
    return Reading(task, columns, roles or {}, rows, dict(bad.most_common()), lost)


# Suspicious rows: one question with several answers, and placeholders that spreadsheets write for missing values


MOST_QUESTIONS = 100_000
"""How many rows are checked; this bounds the memory for their questions."""


def suspicions(rows: Iterable[tuple[str, Row]]) -> list[str]:
    """Return a sentence for each kind of suspicious row; `rows` are canonical, each with its origin or an empty string.

    Checks the first MOST_QUESTIONS rows. Preferences and recordings repeat their prompts, so only empty values count
    there.
    """
    answered: dict[bytes, tuple[bytes, str]] = {}
    several: set[bytes] = set()
    pair = ("", "")
    empty: Counter[str] = Counter()
    labels: list[Any] = []
    kind: RowKind | None = None
    questions = ((origin, row, question) for origin, row in rows for question in kind_of_row(row).questions(row))
    for origin, row, (prompt, answer) in islice(questions, MOST_QUESTIONS):
        kind = kind_of_row(row)
        labels.append(kind.label(row))
        texts = {text.strip() for text in iterate_strings(prompt)}
        if placeholders := NO_VALUES & texts.union(text.strip() for text in iterate_strings(answer)):
            empty.update(placeholders)
        if kind.repeats_prompts or not any(texts):
            continue
        key, answer_hash = hash_content({"prompt": prompt}), hash_content({"answer": answer})
        first, where = answered.setdefault(key, (answer_hash, origin))
        if first != answer_hash:
            pair = pair if several else (where, origin)
            several.add(key)
    sentences = [
        f"rows with {text!r}, a placeholder for a missing value: {count:,}" for text, count in empty.most_common()
    ]
    sentences += [f"{what}. {fix}" for what, fix in kind.doubts(labels)] if kind else []
    if kind and several:
        where = f", first in {pair[0]} and {pair[1]}" if all(pair) else ""
        sentences.append(f"{kind.conflict} in different rows: {len(several):,}{where}")
    return sentences
