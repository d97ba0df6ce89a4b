"""Columns of a file under the names that rows are made of: as the recipe maps them, or by their usual other names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from llmtune.data.rejected_rows import RowError, describe

FIELD = re.compile(r"\{([^{}]+)\}")
"""A column's name in a template."""
_PROMPTS = ("question", "query", "input", "inputs", "user", "human", "request", "problem")
_ANSWERS = ("response", "answer", "output", "outputs", "target", "targets", "assistant", "reply", "bot", "solution")
_CONVERSATION = {
    "prompt": _PROMPTS,
    "completion": _ANSWERS,
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
        "completion": _ANSWERS,
        "chosen": ("chosen_response", "chosen_messages", "preferred"),
        "rejected": ("rejected_response", "rejected_messages", "dispreferred"),
    },
}
"""By task, our name of a column and what others call it."""


def rename(row: Mapping[str, object], columns: Mapping[str, str]) -> Mapping[str, object]:
    """Give mapped columns their canonical names; a column of that name that was there before gives way.

    What is mapped is the name of a column, or a template with names in braces. Raises RowError where a template meets
    something that is no text.
    """
    if not columns:
        return row
    mapped = {ours: _cell(row, theirs) for ours, theirs in columns.items() if _fields(theirs, row) <= row.keys()}
    return {**row, **mapped}


def _cell(row: Mapping[str, object], theirs: str) -> object:
    return row[theirs] if theirs in row else FIELD.sub(lambda found: _text(row[found[1]], found[1]), theirs).strip()


def _text(value: object, name: str) -> str:
    if isinstance(value, dict | list):
        raise RowError("wrong type", f"{name!r} is {describe(value)}; a template takes texts and numbers")
    return "" if value is None else str(value)


def _fields(theirs: str, names: Collection[str]) -> set[str]:
    return {theirs} if theirs in names else set(FIELD.findall(theirs)) or {theirs}


def used_columns(columns: Mapping[str, str], names: Collection[str]) -> set[str]:
    """Return the file's own columns that a mapping reads; `names` are all that it has."""
    return {field for theirs in columns.values() for field in _fields(theirs, names)}


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
        known = (ours, *ALIASES[task].get(ours, ()))
        found = [name for name, spelled in plain.items() if spelled in known]
        if len(found) == 1:
            mapped[ours] = found[0]
    return mapped
