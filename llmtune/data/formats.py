"""Row formats: told apart by the columns of the first rows, and brought into one canonical form a task."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from llmtune.data.messages import MESSAGE_KEYS, RowError, canonical_messages, text_of
from llmtune.errors import Problem, nearest
from llmtune.records import Row


@dataclass(frozen=True)
class RowFormat:
    """A way in which rows are written: the columns that make it out, those that may be there, and a row's meaning."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    chat: Callable[[Mapping[str, Any]], Row] | None
    completion: Callable[[Mapping[str, Any]], Row] | None
    looks: str
    """An example for error messages."""

    def reads(self, task: str) -> Callable[[Mapping[str, Any]], Row] | None:
        """Return what makes a canonical row for `task`: only completion wants bare text, all others messages."""
        return self.completion if task == "completion" else self.chat


def _chat_from_messages(row: Mapping[str, Any]) -> Row:
    tools = row.get("tools")
    return canonical_messages(row["messages"], tools if tools is not None else row.get("functions"), row.get("system"))


def _chat_from_sharegpt(row: Mapping[str, Any]) -> Row:
    return canonical_messages(row["conversations"], row.get("tools"), row.get("system"))


def _alpaca_prompt(row: Mapping[str, Any]) -> str:
    extra = row.get("input")
    parts = [_filled(row, "instruction")]
    if extra is not None and text_of(extra, "'input'").strip():
        parts.append(extra)
    return "\n\n".join(parts)


def _chat_from_alpaca(row: Mapping[str, Any]) -> Row:
    history = row.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history)):
        raise RowError("wrong type", "'history' must be a list of [question, answer] pairs")
    turns = [*(turn for pair in history for turn in pair), _alpaca_prompt(row), _filled(row, "output")]
    return _conversation(turns, row)


def _completion_from_alpaca(row: Mapping[str, Any]) -> Row:
    system = row.get("system")
    head = f"{text_of(system, repr('system'))}\n\n" if system else ""
    return {"prompt": f"{head}{_alpaca_prompt(row)}\n\n", "completion": _filled(row, "output")}


def _chat_from_pair(row: Mapping[str, Any]) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in prompt]
        return canonical_messages([*asked, *completion], row.get("tools"), row.get("system"))
    return _conversation([_filled(row, "prompt"), _filled(row, "completion")], row)


def _conversation(turns: Sequence[object], row: Mapping[str, Any]) -> Row:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return canonical_messages(messages, row.get("tools"), row.get("system"))


def _completion_from_pair(row: Mapping[str, Any]) -> Row:
    return {"prompt": text_of(row["prompt"], "'prompt'"), "completion": _filled(row, "completion")}


def _completion_from_text(row: Mapping[str, Any]) -> Row:
    return {"prompt": "", "completion": _filled(row, "text")}


def _filled(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    text = "" if value is None else text_of(value, f"'{column}'")
    if not text.strip():
        answer = column in ("completion", "output")
        raise RowError("no answer" if answer else "empty content", f"'{column}' is empty")
    return text


FORMATS = {
    form.name: form
    for form in (
        RowFormat(
            name="messages",
            required=("messages",),
            optional=("tools", "functions", "system"),
            chat=_chat_from_messages,
            completion=None,
            looks='{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        ),
        RowFormat(
            name="sharegpt",
            required=("conversations",),
            optional=("tools", "system"),
            chat=_chat_from_sharegpt,
            completion=None,
            looks='{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        ),
        RowFormat(
            name="alpaca",
            required=("instruction", "output"),
            optional=("input", "system", "history", "tools"),
            chat=_chat_from_alpaca,
            completion=_completion_from_alpaca,
            looks='{"instruction": "...", "input": "...", "output": "..."}',
        ),
        RowFormat(
            name="prompt-completion",
            required=("prompt", "completion"),
            optional=("system", "tools"),
            chat=_chat_from_pair,
            completion=_completion_from_pair,
            looks='{"prompt": "...", "completion": "..."}',
        ),
        RowFormat(
            name="text",
            required=("text",),
            optional=(),
            chat=None,
            completion=_completion_from_text,
            looks='{"text": "..."}, or a text file',
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
    if len(usable) == 1:
        return usable[0], None
    if usable:
        names = " and ".join(form.name for form in usable)
        fix = f"Say which with `format: {usable[0].name}` or `format: {usable[1].name}`."
        return None, Problem(f"the columns {_listed(found)} fit {names}", where, fix)
    if matching:
        other = "chat" if task == "completion" else "completion"
        return None, Problem(
            f"{matching[0].name} rows, which task: {task} cannot use",
            where,
            f"Set `task: {other}`, or give other rows.",
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


def canonicalise(row: Mapping[str, Any], form: RowFormat, task: str) -> Row:
    """Return the canonical row.

    Args:
        row: Columns by their canonical names (see `rename`).
        form: How the file is written.
        task: Whose canonical form is wanted.

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
    return reader(row)


def unused_keys(row: Mapping[str, Any], form: RowFormat, columns: Mapping[str, str]) -> list[str]:
    """Name the columns, and the keys of messages, that the canonical row does not hold."""
    used = {columns.get(name, name) for name in (*form.required, *form.optional)}
    unused = [name for name in row if name not in used]
    for turn in next((row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), []):
        if isinstance(turn, dict):
            unused += [f"{key} (in a message)" for key in turn if key not in MESSAGE_KEYS and turn[key] is not None]
    return unused


def to_json(row: Row) -> str:
    """Write a canonical row as it stands in the Arrow file.

    Raises:
        RowError: The text holds half of a surrogate pair, which is no character and cannot be encoded.
    """
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise RowError("not a character", f"{half} is half of a surrogate pair") from None
    return text


def hash_content(row: Row) -> bytes:
    """Hash what a row says: 16 bytes, equal for rows that differ in Unicode composition or outer white space alone."""
    text = json.dumps(_stripped(row), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return xxhash.xxh3_128_digest(text.encode())


def _stripped(row: Row) -> Row:
    if "messages" in row:
        return {**row, "messages": [{**turn, "content": turn["content"].strip()} for turn in row["messages"]]}
    return {"prompt": row["prompt"].strip(), "completion": row["completion"].strip()}


def spoken_text(row: Row) -> str:
    """Return what is compared in the search for near duplicates: all that is said, but for the system message.

    A long system message that all rows share would make them all look alike.
    """
    if "messages" not in row:
        return f"{row['prompt']} {row['completion']}"
    parts = []
    for message in row["messages"]:
        if message["role"] != "system":
            parts.append(message["content"])
            if "tool_calls" in message:
                parts.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    return " ".join(parts)
