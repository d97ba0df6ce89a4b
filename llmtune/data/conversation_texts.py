"""The texts of a conversation: for the searches for duplicates, and for display."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmtune.data.chat_rows import Message, ToolCall, write_answer
from llmtune.data.pictures import PLACE, row_pictures, show_places
from llmtune.data.row_text import (
    LEARNED,
    NearText,
    QuestionAnswer,
    RowInput,
    map_texts,
    plain_form,
    tag_words,
    with_answer,
)
from llmtune.records import Row

RATED = ("chosen", "rejected", "answer")


def _message_texts(messages: Sequence[Message]) -> list[str]:
    parts = []
    for message in messages:
        if message["role"] != "system":
            parts += [message["reasoning"]] if "reasoning" in message else []
            parts.append(message["content"])
            if "tool_calls" in message:
                parts.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    return parts


def near_conversation(row: Row) -> NearText:
    """Return all messages; a short last answer and the pictures must be equal."""
    *before, last = row["messages"] or [{"role": "user", "content": ""}]
    if last["role"] != "assistant" or "tool_calls" in last:
        near = NearText(" ".join(_message_texts(row["messages"])))
    else:
        near = with_answer(" ".join(_message_texts(before)), " ".join(_message_texts([last])))
    return near._replace(context=_picture_hashes(row["messages"]))


def near_preference(row: Row) -> NearText:
    """Return the text of a rated answer; the better of two answers must be the same one, and so must a thumb."""
    conversation = " ".join(_message_texts(row["messages"]))
    if "chosen" in row:
        near = with_answer(conversation, row["chosen"])
        return near._replace(text=f"{near.text} {tag_words(row['rejected'], 'rejected')}")
    near = with_answer(conversation, row["answer"])
    return near._replace(answer=f"{near.answer} {row['good']}")


def compared_conversation(row: Row) -> str:
    """Return all messages except those of the system, and the rated answers; words count only with the pictures."""
    text = " ".join([*_message_texts(row["messages"]), *(row[key] for key in RATED if key in row)])
    return tag_words(text, pictures) if (pictures := _picture_hashes(row["messages"])) else text


def _picture_hashes(messages: Sequence[Message]) -> str:
    """Return the hashes of the pictures, separated by spaces."""
    return " ".join(picture["content"] for picture in row_pictures({"messages": messages}))


def conversation_input(row: Row) -> RowInput:
    """Return the last question of a conversation, with everything before it and all pictures as context."""
    messages = before = row["messages"]
    rated = next((row[key] for key in RATED if key in row), None)
    if rated is None and ends_answered(row):
        places = range(len(messages) - 1, -1, -1)
        before = messages[: next((i for i in places if messages[i]["role"] == "assistant"), len(messages))]
    *earlier, last = before or [{"role": "user", "content": ""}]
    pictures = _picture_hashes(before)

    def context() -> str:
        parts = [[one["role"], *map(plain_form, [one["content"], *_message_texts([one])])] for one in earlier]
        return json.dumps([*parts, [last["role"], json.dumps(row.get("tools"), sort_keys=True)]]) + pictures

    def answer() -> str:
        text = rated if rated is not None else " ".join(_message_texts(messages[len(before) :][:1]))
        return f"{plain_form(text)} {row['good']}" if "good" in row else plain_form(text)

    query = (last["content"] or "").replace(PLACE, " ") if pictures else last["content"] or ""
    return RowInput(query, context, answer, pictures=tuple(pictures.split()))


def conversation_prompt(row: Row) -> str:
    """Return plain text for a single message, else each message with its role."""
    turns = [
        (str(message["role"]), write_answer(_content_text(message), message.get("tool_calls") or ()))
        for message in row["messages"]
    ]
    return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {text}" for role, text in turns)


def map_conversation(row: Row, change: Callable[[Any], Any]) -> Row:
    """Return a row with `change` applied to its columns with text, then to the content of each message."""
    changed = map_texts(row, change)
    return {**changed, "messages": [{**one, "content": change(one.get("content"))} for one in row["messages"]]}


def _content_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be a list of parts, with the names of its pictures."""
    content = message.get("content")
    if message.get("images"):
        return show_places(message)
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def conversation_questions(row: Row) -> list[QuestionAnswer]:
    """Return the last message as the answer to those before it; nothing without an answer."""
    if not ends_answered(row):
        return []
    *before, last = row["messages"]
    texts = [*(one["content"] for one in before), *filter(None, [_picture_hashes(before)])]
    return [(texts, {**last, "rest": [row.get(key) for key in LEARNED]})]


def ends_answered(row: Row) -> bool:
    """Whether the last message is an answer."""
    return bool(row["messages"]) and row["messages"][-1]["role"] == "assistant"


def last_answer(row: Row) -> str:
    """Return the text of the answer that ends a conversation; empty without one."""
    return str(row["messages"][-1]["content"]) if ends_answered(row) else ""


def without_last_answer(row: Row) -> Row:
    """Return the conversation up to its last answer; all of it if it ends with a question."""
    if row["messages"] and not ends_answered(row):
        return row
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    return {**row, "messages": row["messages"][: answers[-1]] if answers else []}


def split_reference(row: Row) -> tuple[Row, str | None, Sequence[ToolCall]]:
    """Split a row into its prompt and its last answer as text, with its calls; None if it does not end with one."""
    *before, last = row["messages"]
    if last["role"] != "assistant":
        return row, None, ()
    calls = last.get("tool_calls") or ()
    return {**row, "messages": before}, write_answer(last.get("content") or "", calls), calls
