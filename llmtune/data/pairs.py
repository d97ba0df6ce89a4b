"""Rows of a text and what is made of it: translations, summaries, and answers that one is preferred of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.data.conversations import filled
from llmtune.data.messages import RowError, canonical_messages, text_of
from llmtune.data.read import describe
from llmtune.records import Row

THUMBS = {"true": True, "false": False, "1": True, "0": False, "up": True, "down": False}
"""How a thumb may be written where a file has no truth values."""


def translation_from_pair(row: Mapping[str, Any]) -> Row:
    """Read `source`, `target` and the languages of this row, if they are there."""
    return {
        "source": filled(row, "source"),
        "target": filled(row, "target"),
        "source_language": _language(row, "source_language"),
        "target_language": _language(row, "target_language"),
    }


def translation_from_map(row: Mapping[str, Any]) -> Row:
    """Read `translation`, texts by language code in the order from source to target, as the hub's sets have it."""
    texts = row["translation"]
    if not isinstance(texts, dict) or len(texts) != 2:
        raise RowError("wrong type", "'translation' must be two texts by language, the source first")
    (source, said), (target, written) = texts.items()
    pair = {"source": said, "target": written}
    return {
        "source": filled(pair, "source"),
        "target": filled(pair, "target"),
        "source_language": source,
        "target_language": target,
    }


def _language(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    return text_of(value, f"'{column}'").strip() or None


def summary_from_pair(row: Mapping[str, Any]) -> Row:
    """Read `document` and `summary`."""
    return {"document": filled(row, "document"), "summary": filled(row, "summary")}


def preference_from_pair(row: Mapping[str, Any]) -> Row:
    """Read `prompt`, `chosen` and `rejected`: texts, or lists of messages that may begin with the prompt.

    Without a `prompt` the messages that both answers share are the prompt.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _from_conversations(prompt, chosen, rejected, row)
    if prompt is None:
        raise RowError("missing column", "'prompt' is missing, and 'chosen' is no list of messages that holds it")
    head = prompt if isinstance(prompt, list) else [{"role": "user", "content": filled(row, "prompt")}]
    return _pair(_prompt(head, row), _said(chosen, "chosen"), _said(rejected, "rejected"))


def preference_from_conversation(row: Mapping[str, Any]) -> Row:
    """Read `conversations` (or `messages`) as the prompt, with `chosen` and `rejected` as the message that follows."""
    turns = row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    if not isinstance(turns, list):
        raise RowError("wrong type", f"the conversation is {describe(turns)}; it must be a list of messages")
    return _pair(_prompt(turns, row), _said(row["chosen"], "chosen"), _said(row["rejected"], "rejected"))


def thumb_from_pair(row: Mapping[str, Any]) -> Row:
    """Read `prompt`, `completion` and `label`: whether the answer is good."""
    prompt = row["prompt"]
    head = prompt if isinstance(prompt, list) else [{"role": "user", "content": filled(row, "prompt")}]
    completion = row["completion"]
    if isinstance(completion, list):
        completion = completion[-1] if completion else ""
    return {**_prompt(head, row), "answer": _said(completion, "completion"), "good": _thumb(row["label"])}


def thumb_from_conversation(row: Mapping[str, Any]) -> Row:
    """Read `messages` that end in the answer, and `label`."""
    whole = canonical_messages(row["messages"], row.get("tools"), row.get("system"))
    last = whole["messages"][-1]
    if last["role"] != "assistant" or len(whole["messages"]) < 2:
        raise RowError("no answer", "the last message is not the assistant's, so there is nothing to judge")
    prompt = {**whole, "messages": whole["messages"][:-1]}
    return {**prompt, "answer": _said(last, "messages"), "good": _thumb(row["label"])}


def _from_conversations(prompt: Any, chosen: list[Any], rejected: list[Any], row: Mapping[str, Any]) -> Row:
    if not chosen or not rejected:
        raise RowError("no answer", "'chosen' or 'rejected' is an empty list")
    head = [*chosen[:-1]]
    if head and head != rejected[:-1]:
        raise RowError("two prompts", "'chosen' and 'rejected' differ before their last message")
    if isinstance(prompt, list) and (not head or head != prompt):
        head = [*prompt, *head]
    elif not head:
        head = [{"role": "user", "content": filled(row, "prompt")}]
    return _pair(_prompt(head, row), _said(chosen[-1], "chosen"), _said(rejected[-1], "rejected"))


def _prompt(turns: list[Any], row: Mapping[str, Any]) -> Row:
    """Check the conversation before the answer."""
    asked = canonical_messages([*turns, {"role": "assistant", "content": "?"}], row.get("tools"), row.get("system"))
    messages = asked["messages"][:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise RowError("no question", "the prompt ends with the assistant's own message")
    return {**asked, "messages": messages}


def _said(answer: Any, column: str) -> str:
    """Return the text of an answer that is a text or a message."""
    if isinstance(answer, dict):
        answer = answer.get("content", answer.get("value"))
    return filled({column: answer}, column)


def _pair(prompt: Row, chosen: str, rejected: str) -> Row:
    if chosen.strip() == rejected.strip():
        raise RowError("chosen equals rejected", "both answers are the same: there is nothing to prefer")
    return {**prompt, "chosen": chosen, "rejected": rejected}


def _thumb(value: Any) -> bool:
    found = THUMBS.get(str(value).strip().lower())
    if found is None:
        raise RowError("no thumb", f"'label' is {value!r}; it must be true or false (1, 0, up, down)")
    return found
