"""Conversations of rows made ready for their template: thoughts as the recipe wants them, special tokens as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import SPELL_OUT, ChatTemplate, Tools
from llmtune.data.control_tokens import (
    UnwritableTextError,
    control_pattern,
    encode_marked,
    find_control_token,
    is_marked,
    joined_text,
    mark,
)
from llmtune.data.tokenization import tokenize_distinct

if TYPE_CHECKING:
    import re

    from llmtune.recipe import Recipe

Ids = Mapping[str, list[int]]
"""The token ids of each rendered text."""


@dataclass(frozen=True)
class Chat:
    """A conversation as its template takes it."""

    messages: list[Message]
    tools: Tools
    keeps_reasoning: bool = False
    """Whether thoughts are read and not learned."""
    marked: bool = False
    """Whether special tokens in it are marked, which are to be plain text."""


def prepare_chats(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[Chat | str]:
    """Return each row's conversation, or the reason why it cannot be used."""
    in_text = recipe.data.special_tokens_in_text
    pattern = control_pattern(template.processor, template.text())
    texts = "\0".join(joined_text(row["messages"], row.get("tools")) for row in rows)
    present = pattern if in_text != "allow" and pattern.search(texts) else None
    return [_prepare(row, template, recipe, present) for row in rows]


def _prepare(row: ChatRow, template: ChatTemplate, recipe: Recipe, pattern: re.Pattern[str] | None) -> Chat | str:
    reasoning = row.get("train_reasoning", recipe.data.reasoning)
    messages = template.prepare(row["messages"], reasoning == "drop")
    tools = row.get("tools") or None
    token = find_control_token(pattern, messages, tools) if pattern is not None else None
    if pattern is None or token is None:
        return Chat(messages, tools, reasoning == "keep")
    if recipe.data.special_tokens_in_text == "refuse":
        return f"the conversation holds the special token {token}. {SPELL_OUT}"
    return Chat(mark(messages, pattern), mark(tools, pattern), reasoning == "keep", marked=True)


def tokenize_chats(template: ChatTemplate, texts: Iterable[str]) -> tuple[Ids, Mapping[str, str]]:
    """Return the ids of rendered texts, and why those that have none cannot be written."""
    distinct = dict.fromkeys(texts)
    marked = [text for text in distinct if is_marked(text)]
    ids = tokenize_distinct(template.processor, [text for text in distinct if not is_marked(text)])
    refused = {}
    for text in marked:
        try:
            ids[text] = encode_marked(template.processor, text)
        except UnwritableTextError as error:
            refused[text] = str(error)
    return ids, refused
