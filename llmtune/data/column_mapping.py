"""Columns of a file under the names that rows are made of: as the recipe maps them, or by their usual other names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from llmtune.data.message_roles import with_roles
from llmtune.data.rejected_rows import RowError, describe

FIELD = re.compile(r"\{([^{}]+)\}")
"""A column's name in a template."""
_PROMPTS = ("question", "query", "input", "inputs", "user", "human", "request", "problem")
ANSWERS = ("response", "answer", "output", "outputs", "target", "targets", "assistant", "reply", "bot", "solution")
_CONVERSATION = {
    "prompt": _PROMPTS,
    "completion": ANSWERS,
    "output": ("response", "answer", "completion"),
    "input": ("context",),
    "system": ("system_prompt", "system_message"),
}
ALIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "chat": _CONVERSATION,
    "completion": {**_CONVERSATION, "text": ("content",)},
    "translate": {
        "source": ("src", "source_text", "source_sentence"),
        "target": ("tgt", "target_text", "target_sentence"),
        "source_language": ("source_lang", "src_lang"),
        "target_language": ("target_lang", "tgt_lang"),
    },
    "summarize": {
        "document": ("text", "article", "dialogue", "content", "body", "report", "description"),
        "summary": ("highlights", "abstract", "headline", "tldr"),
    },
    "qa": {
        "question": ("query",),
        "context": ("passage", "paragraph", "document", "article", "text"),
        "answer": ("response", "answer_text"),
    },
    "classify": {
        "text": (
            *("sentence", "content", "review", "body", "message", "comment", "tweet", "description", "question"),
            *("premise", "sentence1", "text1", "input", "prompt"),
        ),
        "pair": ("hypothesis", "sentence2", "text2", "text_pair"),
        "label": ("category", "class", "labels", "target", "sentiment", "intent", "topic", "score", "rating", "stars"),
    },
    "token-classify": {"tokens": ("words",), "tags": ("ner_tags", "labels"), "spans": ("entities",)},
    "speech": {
        "audio": ("path", "file", "wav", "recording", "audio_path", "audio_file", "audio_filepath"),
        "file_name": ("filename",),
        "text": ("transcription", "transcript", "sentence", "normalized_text"),
    },
    "preference": {
        "prompt": ("question", "instruction", "query", "input"),
        "completion": ANSWERS,
        "chosen": ("chosen_response", "chosen_messages", "preferred"),
        "rejected": ("rejected_response", "rejected_messages", "dispreferred"),
    },
}
"""By task, our name of a column and what others call it."""
COMPARED = ("chosen", "rejected", *ALIASES["preference"]["chosen"], *ALIASES["preference"]["rejected"])
"""Columns of answers of which one is the worse: no other task may learn from them."""

NAMES_AT_ONCE = 200
"""Columns and keys within them that a row is searched for."""
MISSING = object()
"""What `find` returns where there is no such column or key."""


def rename(
    row: Mapping[str, object], columns: Mapping[str, str], roles: Mapping[str, Sequence[str]] | None = None
) -> Mapping[str, object]:
    """Give mapped columns their canonical names, and messages our roles; a column that had the name before gives way.

    A mapping names a column, a key within one (`thread.messages`), or is a template with such names in braces. Raises
    RowError where a template meets something that is no text.
    """
    if columns:
        row = {**row, **{ours: _cell(row, theirs) for ours, theirs in columns.items() if holds(row, theirs)}}
    return with_roles(row, roles) if roles else row


def find(row: Mapping[str, object], name: str) -> object:
    """Return the value of a column, or of a key within it, such as `thread.messages`; else MISSING."""
    if name in row:
        return row[name]
    value: object = row
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def holds(row: Mapping[str, object], theirs: str) -> bool:
    """Whether a row has all that a mapping names."""
    return all(find(row, field) is not MISSING for field in fields(theirs, row))


def flatten(row: Mapping[str, object]) -> dict[str, object]:
    """Return a row with the keys of its objects as columns of their own, by their paths."""
    flat: dict[str, object] = {}
    waiting = list(row.items())
    for name, value in waiting:  # grows
        if isinstance(value, dict) and value and len(waiting) < NAMES_AT_ONCE:
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            flat[name] = value
    return flat


def _cell(row: Mapping[str, object], theirs: str) -> object:
    value = find(row, theirs)
    if value is not MISSING:
        return value
    return FIELD.sub(lambda found: _text(find(row, found[1]), found[1]), theirs).strip()


def _text(value: object, name: str) -> str:
    if isinstance(value, dict | list):
        raise RowError("wrong type", f"{name!r} is {describe(value)}; a template takes texts and numbers")
    return "" if value is None else str(value)


def fields(theirs: str, names: Collection[str]) -> set[str]:
    """Return the columns, or keys within them, that a mapping names; `names` are those of the columns."""
    return {theirs} if theirs in names else set(FIELD.findall(theirs)) or {theirs}


def used_columns(columns: Mapping[str, str], names: Collection[str]) -> set[str]:
    """Return the file's own columns that a mapping reads; `names` are all that it has."""
    found = {field for theirs in columns.values() for field in fields(theirs, names)}
    return {field if field in names or (top := field.split(".")[0]) not in names else top for field in found}


def with_aliases(
    columns: Mapping[str, str], wanted: Collection[str], names: Collection[str], task: str
) -> dict[str, str]:
    """Return `columns` with each of the `wanted` that the file has under another usual name, and under one alone."""
    taken = used_columns(columns, names)
    plain = {name: re.sub(r"[\s-]+", "_", name.strip().casefold()) for name in names if name not in taken}
    mapped = dict(columns)
    for ours in wanted:
        if ours in mapped or ours in names:
            continue
        known = (ours, *ALIASES.get(task, {}).get(ours, ()))
        found = [name for name, spelled in plain.items() if spelled in known]
        if len(found) == 1:
            mapped[ours] = found[0]
    return mapped
