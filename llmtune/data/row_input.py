"""A row's input: what it asks, without its answer, as a hash for comparison between runs."""

from __future__ import annotations

from llmtune.data.contamination import same_form
from llmtune.data.row_hash import hash_content, iterate_strings
from llmtune.records import Row

ANSWERS = frozenset(
    {
        *("answer", "answers", "chosen", "completion", "good", "label", "negatives", "passages", "rejected"),
        *("relevances", "score", "summary", "tags", "target"),
    }
)
"""Keys of a row that are not part of its input."""


def hash_input(row: Row) -> bytes:
    """Hash a row without its answer; case, width and the kind of spaces make no difference.

    A text without a prompt is its own input. With a score, the passage belongs to the input.
    """
    answers = ANSWERS - ({"passages"} if row.get("score") is not None else set())
    asked = {key: value for key, value in row.items() if key not in answers and not ("audio" in row and key == "text")}
    if "messages" in row and answers.isdisjoint(row):
        replies = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        asked["messages"] = row["messages"][: replies[-1]] if replies else row["messages"]
    if not any(text.strip() for text in iterate_strings(asked)):
        asked = dict(row)
    return hash_content(_same_forms(asked))


def _same_forms(value: dict[str, object]) -> dict[str, object]:
    return {key: _same_form(item) for key, item in value.items()}


def _same_form(value: object) -> object:
    if isinstance(value, dict):
        return _same_forms(value)
    if isinstance(value, list):
        return [_same_form(item) for item in value]
    return same_form(value) if isinstance(value, str) else value
