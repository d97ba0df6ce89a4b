"""Row formats: told apart by the columns of the first rows, and brought into one canonical form a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.data.audio import find_recording, speech_from_columns, speech_from_folder
from llmtune.data.chat_rows import (
    MESSAGE_KEYS,
    chat_from_alpaca,
    chat_from_messages,
    chat_from_pair,
    chat_from_sharegpt,
    completion_from_alpaca,
    completion_from_pair,
    completion_from_text,
)
from llmtune.data.labelled_rows import classified, question_answer, question_squad, tagged_spans, tagged_tokens
from llmtune.data.rejected_rows import RowError
from llmtune.data.text_pair_rows import (
    preference_from_conversation,
    preference_from_pair,
    summary_from_pair,
    thumb_from_conversation,
    thumb_from_pair,
    translation_from_map,
    translation_from_pair,
)
from llmtune.errors import Problem, nearest

Reader = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class RowFormat:
    """A way in which rows are written: the columns that make it out, those that may be there, and a row's meaning."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    readers: Mapping[str, Reader]
    """By task, what makes a canonical row."""
    looks: str
    """An example for error messages."""
    files: tuple[str, ...] = ()
    """Columns that name files, relative to the one that the row stands in."""

    def reads(self, task: str) -> Reader | None:
        """Return what makes a canonical row for `task`, or None."""
        return self.readers.get(task)


FORMATS = {
    form.name: form
    for form in (
        RowFormat(
            "messages",
            ("messages",),
            ("tools", "functions", "system"),
            {"chat": chat_from_messages},
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        ),
        RowFormat(
            "sharegpt",
            ("conversations",),
            ("tools", "system"),
            {"chat": chat_from_sharegpt},
            '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        ),
        RowFormat(
            "alpaca",
            ("instruction", "output"),
            ("input", "system", "history", "tools"),
            {"chat": chat_from_alpaca, "completion": completion_from_alpaca},
            '{"instruction": "...", "input": "...", "output": "..."}',
        ),
        RowFormat(
            "prompt-completion",
            ("prompt", "completion"),
            ("system", "tools"),
            {"chat": chat_from_pair, "completion": completion_from_pair},
            '{"prompt": "...", "completion": "..."}',
        ),
        RowFormat("text", ("text",), (), {"completion": completion_from_text}, '{"text": "..."}, or a text file'),
        RowFormat(
            "source-target",
            ("source", "target"),
            ("source_language", "target_language"),
            {"translate": translation_from_pair},
            '{"source": "...", "target": "..."}',
        ),
        RowFormat(
            "translation",
            ("translation",),
            (),
            {"translate": translation_from_map},
            '{"translation": {"en": "...", "de": "..."}}',
        ),
        RowFormat(
            "document-summary",
            ("document", "summary"),
            (),
            {"summarize": summary_from_pair},
            '{"document": "...", "summary": "..."}',
        ),
        RowFormat(
            "squad",
            ("question", "context", "answers"),
            (),
            {"qa": question_squad},
            '{"question": "...", "context": "...", "answers": {"text": ["..."], "answer_start": [17]}}',
        ),
        RowFormat(
            "question-answer",
            ("question", "context", "answer"),
            (),
            {"qa": question_answer},
            '{"question": "...", "context": "...", "answer": "..."}',
        ),
        RowFormat(
            "text-label",
            ("text", "label"),
            ("pair",),
            {"classify": classified},
            '{"text": "...", "label": "..."}',
        ),
        RowFormat(
            "tokens-tags",
            ("tokens", "tags"),
            (),
            {"token-classify": tagged_tokens},
            '{"tokens": ["Ada", "Lovelace", "wrote"], "tags": ["B-PERSON", "I-PERSON", "O"]}',
        ),
        RowFormat(
            "text-spans",
            ("text", "spans"),
            (),
            {"token-classify": tagged_spans},
            '{"text": "Ada wrote", "spans": [{"start": 0, "end": 3, "label": "PERSON"}]}',
        ),
        RowFormat(
            "audio-text",
            ("audio", "text"),
            (),
            {"speech": speech_from_columns},
            '{"audio": "recordings/1.wav", "text": "..."}',
            files=("audio",),
        ),
        RowFormat(
            "audio-folder",
            ("file_name", "text"),
            (),
            {"speech": speech_from_folder},
            "file_name,text in a metadata.csv beside the recordings",
            files=("file_name",),
        ),
        RowFormat(
            "conversation-pair",
            ("conversations", "chosen", "rejected"),
            ("tools", "system"),
            {"preference": preference_from_conversation},
            '{"conversations": [...], "chosen": {"from": "gpt", "value": "..."}, "rejected": {...}}',
        ),
        RowFormat(
            "chosen-rejected",
            ("chosen", "rejected"),
            ("prompt", "tools", "system"),
            {"preference": preference_from_pair},
            '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        ),
        RowFormat(
            "answer-thumb",
            ("prompt", "completion", "label"),
            ("tools", "system"),
            {"preference": thumb_from_pair},
            '{"prompt": "...", "completion": "...", "label": true}',
        ),
        RowFormat(
            "conversation-thumb",
            ("messages", "label"),
            ("tools", "system"),
            {"preference": thumb_from_conversation},
            '{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "label": true}',
        ),
    )
}
COLUMNS = tuple(sorted({name for form in FORMATS.values() for name in (*form.required, *form.optional)}))
"""Canonical column names: what the keys of `columns:` may be."""


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Give mapped columns their canonical names; a column of that name that was there before gives way."""
    if not columns:
        return row
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def detect(
    rows: Sequence[Mapping[str, Any]], task: str, columns: Mapping[str, str], forced: str | None, where: str
) -> tuple[RowFormat | None, Problem | None]:
    """Tell the format of a file by its first rows.

    Args:
        rows: The first good rows; at least one.
        task: The recipe's task, which rules formats out.
        columns: The source's `columns`, canonical name to the file's own.
        forced: The row format that the source names, if it does.
        where: The file, for the problem.

    Returns:
        The format, or what is wrong and how to mend it.
    """
    found = list(dict.fromkeys(name for row in rows for name in row))
    problem = _check_columns(columns, found, where)
    if problem:
        return None, problem
    matching = [form for form in FORMATS.values() if _matches(form, rows, columns)]
    if forced:
        return _forced(FORMATS[forced], matching, task, found, where)
    usable = [form for form in matching if form.reads(task)]
    if len(usable) > 1:  # what asks for more says more: conversations beside chosen and rejected
        usable = [form for form in usable if not any(set(form.required) < set(other.required) for other in usable)]
    if len(usable) == 1:
        return usable[0], None
    if usable:
        names = " and ".join(form.name for form in usable)
        fix = f"Say which with `format: {usable[0].name}` or `format: {usable[1].name}`."
        return None, Problem(f"the columns {_listed(found)} fit {names}", where, fix)
    if matching:
        others = " or ".join(f"`task: {name}`" for name in matching[0].readers)
        return None, Problem(
            f"{matching[0].name} rows, which task: {task} cannot use",
            where,
            f"Set {others}, or give other rows.",
        )
    return None, _no_match(rows, columns, task, found, where)


def _check_columns(columns: Mapping[str, str], found: list[str], where: str) -> Problem | None:
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            what = (
                f"columns: {ours!r} is not a column that llmtune knows ({', '.join(COLUMNS)}).{nearest(ours, COLUMNS)}"
            )
            return Problem(what, where)
        if theirs not in found:
            what = f"columns: there is no column {theirs!r}; found {_listed(found)}.{nearest(theirs, found)}"
            return Problem(what, where)
    return None


def _matches(form: RowFormat, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bool:
    """Whether all rows have what the format needs; with `columns`, it must use what they map."""
    if any(name not in form.required and name not in form.optional for name in columns):
        return False
    if columns and not set(form.required) & set(columns):
        return not any(set(other.required) & set(columns) for other in FORMATS.values()) and _has_all(
            form, rows, columns
        )
    return _has_all(form, rows, columns)


def _has_all(form: RowFormat, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bool:
    return all(columns.get(name, name) in row for row in rows for name in form.required)


def _forced(
    form: RowFormat, matching: Sequence[RowFormat], task: str, found: list[str], where: str
) -> tuple[RowFormat | None, Problem | None]:
    if not form.reads(task):
        what = f"format: {form.name} cannot be used by task: {task}"
        return None, Problem(what, where, f"Use one of {', '.join(f.name for f in FORMATS.values() if f.reads(task))}.")
    if form in matching:
        return form, None
    what = f"format: {form.name} needs {_listed(form.required)}; the columns are {_listed(found)}"
    return None, Problem(what, where, f"Map them with `columns: {{{form.required[0]}: YOUR_COLUMN}}`.")


def _no_match(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], task: str, found: list[str], where: str
) -> Problem:
    kinds = [next((f.name for f in FORMATS.values() if _matches(f, [row], columns)), None) for row in rows]
    if len(set(kinds)) > 1:
        told = next(number for number, kind in enumerate(kinds) if kind != kinds[0])
        names = f"row 1 is {kinds[0] or 'of no known format'}, row {told + 1} {kinds[told] or 'of no known format'}"
        return Problem(f"mixed formats: {names}", where, "Put each format into a file and a source of its own.")
    usable = [form for form in FORMATS.values() if form.reads(task)]
    known = "\n    ".join(f"{form.name}: {form.looks}" for form in usable)
    first = usable[-1].required
    mapped = ", ".join(f"{name}: YOUR_COLUMN" for name in first)
    what = f"the format is not known by the columns {_listed(found)}"
    return Problem(what, where, f"Formats:\n    {known}\n    or map columns: `columns: {{{mapped}}}`.")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown or "(none)"


def canonicalise(row: Mapping[str, Any], form: RowFormat, task: str, folder: Path | None = None) -> Mapping[str, Any]:
    """Return the canonical row.

    Args:
        row: Columns by their canonical names (see `rename`).
        form: How the file is written.
        task: Whose canonical form is wanted.
        folder: What the names of files in the row are relative to.

    Raises:
        RowError: The row cannot be trained on.
    """
    for name in form.required:
        if name not in row:
            other = next((f.name for f in FORMATS.values() if all(column in row for column in f.required)), None)
            hint = f"; it looks like a {other} row" if other else ""
            raise RowError("missing column", f"{form.name} rows need {name!r}{hint}")
    reader = form.reads(task)
    assert reader is not None, "detect() returns formats that the task reads"
    return reader(_placed(row, form, folder) if form.files and folder is not None else row)


def _placed(row: Mapping[str, Any], form: RowFormat, folder: Path) -> Mapping[str, Any]:
    """Give files that the row names their whole path."""
    named = {column: find_recording(row[column]) for column in form.files}
    return {**row, **{column: str((folder / name).absolute()) for column, name in named.items() if name}}


def unused_keys(row: Mapping[str, Any], form: RowFormat, columns: Mapping[str, str]) -> list[str]:
    """Name the columns, and the keys of messages, that the canonical row does not hold."""
    used = {columns.get(name, name) for name in (*form.required, *form.optional)}
    unused = [name for name in row if name not in used]
    for turn in next((row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), []):
        if isinstance(turn, dict):
            unused += [f"{key} (in a message)" for key in turn if key not in MESSAGE_KEYS and turn[key] is not None]
    return unused
