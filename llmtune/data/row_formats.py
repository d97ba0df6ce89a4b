"""Row formats: detected by the columns of the first rows, and converted to one canonical form per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.data.class_spelling import NoteName, tidy_cell
from llmtune.data.column_mapping import (
    fields,
    find,
    flatten,
    has_columns,
    names_pictures,
    rename,
    used_columns,
    with_aliases,
)
from llmtune.data.pictures import IMAGE, locate_picture, may_be_picture, read_pictures, refuse_bare_marks, row_pictures
from llmtune.data.prompt_rows import OPEN_PARSERS
from llmtune.data.rejected_rows import RowError, find_file
from llmtune.data.row_kind import MESSAGES, RowParser, kind_of_task
from llmtune.errors import DataError, LlmtuneError, nearest
from llmtune.recipe.format_names import PROMPT_ALONE
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Row

TEXT_EXAMPLE = '"..."'
EXAMPLES = {
    "messages": '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
    "conversations": '[{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]',
    "translation": '{"en": "...", "de": "..."}',
    "answers": '{"text": ["..."], "answer_start": [17]}',
    "tokens": '["Ada", "Lovelace", "wrote"]',
    "tags": '["B-PERSON", "I-PERSON", "O"]',
    "spans": '[{"start": 0, "end": 3, "label": "PERSON"}]',
    "audio": '"recordings/1.wav"',
    "image": '"pictures/1.jpg"',
    "relevance": "1",
    "passages": '["...", "..."]',
    "relevances": "[1, 0]",
    "negatives": '["...", "..."]',
}
"""Example cells by column for error messages; other columns contain text."""


@dataclass(frozen=True)
class RowFormat:
    """A row format: required columns, and optional ones. A kind of rows has a parser for it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    stated: str = ""
    """An example for error messages, if one made of the required columns is not enough."""
    files: tuple[str, ...] = ()
    """Columns that name files, relative to the file of the row."""
    picture: str = ""
    """A column whose cells must look like pictures for the format to be detected."""
    labels: tuple[str, ...] = ()
    """Columns with names of classes, in any form: a text, a list, spans with a `label`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that the format reads."""
        return (*self.required, *self.optional)

    @property
    def example(self) -> str:
        """An example for error messages."""
        cells = (f'"{name}": {EXAMPLES.get(name, TEXT_EXAMPLE)}' for name in self.required)
        return self.stated or f"{{{', '.join(cells)}}}"

    def parser(self, task: str) -> RowParser | None:
        """Return the parser for `task`, or None."""
        parser = OPEN_PARSERS.get(self.name) if TASK_FACTS[task].rates_answers else None
        return parser or kind_of_task(task).parsers.get(self.name)


_STATED = ("system", "tools", "functions", "train_reasoning", "images")
_KNOWN = (
    RowFormat("messages", ("messages",), _STATED),
    RowFormat("sharegpt", ("conversations",), _STATED),
    RowFormat(
        "alpaca",
        ("instruction", "output"),
        ("input", "history", *_STATED),
        '{"instruction": "...", "input": "...", "output": "..."}',
    ),
    RowFormat("prompt-completion", ("prompt", "completion"), _STATED),
    RowFormat("image-answer", ("image", "answer"), ("question", "system"), picture="image"),
    RowFormat("text", ("text",), (), '{"text": "..."}, or a text file'),
    RowFormat("source-target", ("source", "target"), ("source_language", "target_language")),
    RowFormat("translation", ("translation",), ()),
    RowFormat("document-summary", ("document", "summary"), ()),
    RowFormat("squad", ("question", "context", "answers"), ()),
    RowFormat("question-answer", ("question", "context", "answer"), ()),
    RowFormat("text-label", ("text", "label"), ("pair",), labels=("label",)),
    RowFormat("tokens-tags", ("tokens", "tags"), (), labels=("tags",)),
    RowFormat("text-spans", ("text", "spans"), (), labels=("spans",)),
    RowFormat("audio-text", ("audio", "text"), (), files=("audio",)),
    RowFormat(
        "audio-folder",
        ("file_name", "text"),
        (),
        "file_name,text in a metadata.csv next to the recordings",
        files=("file_name",),
    ),
    RowFormat(
        "conversation-pair",
        ("conversations", "chosen", "rejected"),
        ("tools", "system"),
        '{"conversations": [...], "chosen": {"from": "gpt", "value": "..."}, "rejected": {...}}',
    ),
    RowFormat(
        "chosen-rejected",
        ("chosen", "rejected"),
        ("prompt", "tools", "system"),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    ),
    RowFormat(
        "answer-thumb",
        ("prompt", "completion", "label"),
        ("tools", "system"),
        '{"prompt": "...", "completion": "...", "label": true}',
    ),
    RowFormat(
        "conversation-thumb",
        ("messages", "label"),
        ("tools", "system"),
        '{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "label": true}',
    ),
    RowFormat("query-passage", ("query", "passage"), ("negatives", "score")),
    RowFormat("query-passage-relevance", ("query", "passage", "relevance"), ()),
    RowFormat("query-passages", ("query", "passages", "relevances"), ()),
    RowFormat(
        "query-judged-passages",
        ("query", "judged_passages"),
        (),
        '{"query": "...", "judged_passages": [{"text": "...", "relevance": 1}, {"text": "...", "relevance": 0}]}',
    ),
    RowFormat("query-passage-negatives", ("query", "passage", "negatives"), ()),
    RowFormat(PROMPT_ALONE, ("prompt",), ("completion", *_STATED)),
)
FORMATS = {one.name: one for one in _KNOWN}
SIGNIFICANT = tuple(one for one in _KNOWN if one.name != PROMPT_ALONE)
"""Formats whose columns tell what a file is for."""
CONVERSATIONS = ("messages", "conversations")
READABLE_SHARE = 0.5
"""Share of the first rows that a reading must accept: a file may have bad rows."""
MEDIA = {f"{kind}{s}": f"<{kind}>" for kind in ("image", "video", "audio") for s in ("", "s")}
"""Columns with media, and the mark for each in a text."""
COLUMNS = tuple(sorted({name for one in FORMATS.values() for name in one.columns}))
"""Canonical column names: the allowed keys of `columns:`."""


def detect_format(
    rows: Sequence[Mapping[str, object]],
    task: str,
    columns: Mapping[str, str],
    forced: str | None,
    where: str,
    suggest: Callable[[], str | None] = lambda: None,
) -> RowFormat:
    """Detect a file's format from its first rows: by the file's column names first, then by usual aliases.

    Args:
        rows: The first good rows; at least one.
        task: The recipe's task, which excludes some formats.
        columns: The source's `columns`: canonical name to the file's name, or a template of names.
        forced: The row format that the source names, if any.
        where: The file, for the error.
        suggest: Returns a line of the recipe that would read the file, if one is known.

    Raises:
        DataError: No format fits, or several do. The error includes a fix.
    """
    present = list(dict.fromkeys(name for row in rows for name in row))
    check_mapped(columns, rows, where)
    usable = [one for one in FORMATS.values() if one.parser(task)]
    known = (one for one in FORMATS.values() if one in SIGNIFICANT or one in usable)
    matching = [one for one in known if _has_required(one, rows, columns)]
    aliased = [one for one in usable if _has_required(one, rows, map_columns(one, rows, task, columns))]
    if forced:
        return _check_forced(FORMATS[forced], [*matching, *aliased], usable, task, present, where)
    fitting = [one for one in matching if one in usable]
    larger = (one for one in aliased if any(set(smaller.required) < set(one.required) for smaller in fitting))
    fitting += [one for one in larger if one not in fitting]
    if not fitting and aliased:  # prefer the reading that leaves the fewest columns unused
        mapped = [{name: name for name in one.columns} | map_columns(one, rows, task, columns) for one in aliased]
        read = [len(used_columns(one, present) & {*present}) for one in mapped]
        fitting = [one for one, count in zip(aliased, read, strict=True) if count == max(read)]
    if len(fitting) > 1:  # the longer list of columns wins: conversations next to chosen and rejected
        fitting = [one for one in fitting if not any(set(one.required) < set(other.required) for other in fitting)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(one.name for one in fitting)
        fix = f"Choose with `format: {fitting[0].name}` or `format: {fitting[1].name}`."
        raise DataError.of(f"the columns {_name_list(present)} fit {names}", where, fix)
    suggestion = suggest()
    if matching:
        others = " or ".join(f"`task: {name}`" for name in TASK_FACTS if matching[0].parser(name))
        what = f"{matching[0].name} rows, which task: {task} cannot use"
        instead = f"map the columns:\n    {suggestion}" if suggestion else "give other rows."
        raise DataError.of(what, where, f"Set {others}, or {instead}")
    raise _unknown_format(rows, task, columns, usable, present, where, suggestion)


def map_columns(
    row_format: RowFormat, rows: Sequence[Mapping[str, object]], task: str, columns: Mapping[str, str]
) -> dict[str, str]:
    """Return the file's column names for a format: by the recipe's mapping, then by usual aliases."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return with_aliases(columns, row_format.columns, names, kind_of_task(task).aliases)


def check_mapped(columns: Mapping[str, str], rows: Sequence[Mapping[str, object]], where: str) -> None:
    """Refuse a mapping of an unknown canonical column, or of a column that no row has. Raises DataError."""
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            choices = f"({', '.join(COLUMNS)}).{nearest(ours, COLUMNS)}"
            raise DataError.of(f"columns: {ours!r} is not a column that llmtune knows {choices}", where)
        names = fields(theirs, {name for row in rows for name in row})
        missing = [name for name in names if not any(has_columns(row, name) for row in rows)]
        if missing:
            present = list(dict.fromkeys(name for row in rows for name in flatten(row)))
            choices = f"found {_name_list(present)}.{nearest(missing[0], present)}"
            raise DataError.of(f"columns: column {missing[0]!r} not found; {choices}", where)


def _has_required(row_format: RowFormat, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str]) -> bool:
    """Whether all rows have the format's required columns; a mapping in `columns` must be used too."""
    if any(name not in row_format.columns for name in columns):
        return False
    mapped = set(columns)
    if mapped.isdisjoint(row_format.required) and any(mapped & set(other.required) for other in FORMATS.values()):
        return False
    if not all(has_columns(row, columns.get(name, name)) for row in rows for name in row_format.required):
        return False
    column = columns.get(row_format.picture, row_format.picture)
    return not column or sum(may_be_picture(find(row, column)) for row in rows) >= READABLE_SHARE * len(rows)


def _check_forced(
    row_format: RowFormat,
    matching: Sequence[RowFormat],
    usable: Sequence[RowFormat],
    task: str,
    present: list[str],
    where: str,
) -> RowFormat:
    if row_format not in usable:
        what = f"format: {row_format.name} cannot be used by task: {task}"
        raise DataError.of(what, where, f"Use one of {', '.join(one.name for one in usable)}.")
    if row_format not in matching:
        what = (
            f"format: {row_format.name} needs {_name_list(row_format.required)}; the columns are {_name_list(present)}"
        )
        raise DataError.of(what, where, f"Map them with `columns: {{{row_format.required[0]}: YOUR_COLUMN}}`.")
    return row_format


def _unknown_format(
    rows: Sequence[Mapping[str, object]],
    task: str,
    columns: Mapping[str, str],
    usable: Sequence[RowFormat],
    present: list[str],
    where: str,
    suggestion: str | None,
) -> LlmtuneError:
    kinds = [next((one.name for one in SIGNIFICANT if _has_required(one, [row], columns)), None) for row in rows]
    if len(set(kinds)) > 1:
        other = next(number for number, kind in enumerate(kinds) if kind != kinds[0])
        names = f"row 1 is {kinds[0] or 'of no known format'}, row {other + 1} {kinds[other] or 'of no known format'}"
        return DataError.of(f"mixed formats: {names}", where, "Put each format into its own file and source.")
    formats = "\n    ".join(f"{one.name}: {one.example}" for one in usable)
    what = f"unknown row format: the columns are {_name_list(present)}"
    if suggestion:
        return DataError.of(what, where, f"Map them; this line of the section `data` reads the file:\n    {suggestion}")
    texts = max(
        reversed(usable), key=lambda one: (not one.picture, min(len(one.required), len(present)))
    )  # no messages for two texts
    mapped = ", ".join(f"{name}: YOUR_COLUMN" for name in texts.required)
    source = f"`train: {{path: {where}, columns: {{{mapped}}}}}`"
    pictured = next((name for name in present if names_pictures(rows, name)), None)
    if pictured and not TASK_FACTS[task].takes_images:
        readers = [name for name, facts in TASK_FACTS.items() if facts.takes_images]
        what += f"; {pictured!r} has pictures, which only `task: {' or '.join(readers)}` reads"
    return DataError.of(what, where, f"Formats:\n    {formats}\n    or map columns in the section `data`: {source}.")


def _name_list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown or "(none)"


def parse_row(
    row: Mapping[str, object],
    row_format: RowFormat,
    task: str,
    folder: Path | None = None,
    note: NoteName = lambda written, name: None,
) -> Row:
    """Return the canonical row.

    Args:
        row: Columns under their canonical names (see `rename`).
        row_format: The file's format.
        task: The task whose canonical row is made.
        folder: Base of the file names in the row.
        note: Called for each class name that changes, with its form in the file and the usual one (`tidy_name`).

    Raises:
        RowError: The row cannot be trained on.
    """
    for name in row_format.required:
        if name not in row:
            other = next((one.name for one in SIGNIFICANT if all(column in row for column in one.required)), None)
            hint = f"; it looks like a {other} row" if other else ""
            raise RowError("missing column", f"{row_format.name} rows need {name!r}{hint}")
    _refuse_media(row, row_format, task)
    parse = row_format.parser(task)
    assert parse is not None, "detect_format() returns formats that the task can parse"
    if folder is not None:  # make the row's file names absolute
        files = {column: find_file(row[column]) for column in row_format.files}
        row = {**row, **{column: str((folder / name).absolute()) for column, name in files.items() if name}}
    if row_format.labels:
        row = {**row, **{column: tidy_cell(row[column], note) for column in row_format.labels}}
    parsed: Row = parse(row)
    if kind_of_task(task) is MESSAGES:
        read_pictures(parsed["messages"], folder)
        refuse_bare_marks(parsed["messages"])
    return parsed


def list_media(row: Mapping[str, object], row_format: RowFormat, task: str, folder: Path) -> list[Path]:
    """Return the files of the recordings and pictures that a row names, unread; none of a bad row."""
    names = [name for column in row_format.files if (name := find_file(row.get(column)))]
    if kind_of_task(task) is not MESSAGES or not row:
        return [folder / name for name in names]
    parse = row_format.parser(task)
    try:
        parsed = parse(row) if parse else {}
        places = [locate_picture(picture, folder) for picture in row_pictures(parsed)]
    except (RowError, LookupError):
        return []
    return [place for place in places if isinstance(place, Path)]


def _refuse_media(row: Mapping[str, object], row_format: RowFormat, task: str) -> None:
    """Refuse a text that refers to a picture, video or recording in a column that is not read. Raises RowError."""
    for name, mark in MEDIA.items():
        is_read = kind_of_task(task) is MESSAGES if mark == IMAGE else name in row_format.columns
        if is_read or not row.get(name):
            continue
        if name in row_format.columns:
            raise RowError("content that is not text", f"{name!r} has a picture; only `task: chat` learns from them")
        if any(mark in str(row[column]) for column in row_format.columns if column in row):
            raise RowError("content that is not text", f"{mark} refers to the column {name!r}; only text is learned")


def reads_rows(
    rows: Sequence[Mapping[str, object]], task: str, columns: Mapping[str, str], folder: Path | None = None
) -> bool:
    """Whether `task` reads at least half of these rows with `columns`."""
    try:
        row_format = detect_format(rows, task, columns, None, "")
    except DataError:
        return False
    mapping, good = map_columns(row_format, rows, task, columns), 0
    for row in rows:
        try:
            parse_row(rename(row, mapping), row_format, task, folder)
            good += 1
        except RowError:
            pass
    return good >= READABLE_SHARE * len(rows)
