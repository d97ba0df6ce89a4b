"""Conversations of rows made ready for their template: thoughts as the recipe wants them, special tokens as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

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
from llmtune.data.overlong import Encoded
from llmtune.data.tokenization import tokenize_distinct

if TYPE_CHECKING:
    import re

    from llmtune.recipe.schema import Recipe

Ids = Mapping[str, list[int]]
"""The token ids of each rendered text."""


class Draft(Protocol):
    """A conversation as text, before it is tokenized."""

    @property
    def texts(self) -> list[str]:
        """All that must be tokenized to find what is learned."""


D = TypeVar("D", bound=Draft)


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


def encode_drafts(
    drafts: Sequence[D | str], template: ChatTemplate, assemble: Callable[[D, ChatTemplate, Ids], Encoded]
) -> list[Encoded]:
    """Return what `assemble` makes of each draft with the ids of its texts, or the reason why there is nothing."""
    distinct = dict.fromkeys(text for draft in drafts if not isinstance(draft, str) for text in draft.texts)
    marked = [text for text in distinct if is_marked(text)]
    ids = tokenize_distinct(template.processor, [text for text in distinct if not is_marked(text)])
    refused = {}
    for text in marked:
        try:
            ids[text] = encode_marked(template.processor, text)
        except UnwritableTextError as error:
            refused[text] = str(error)

    def encode(draft: D | str) -> Encoded:
        if isinstance(draft, str):
            return draft
        reason = next((refused[text] for text in draft.texts if text in refused), None) if refused else None
        return reason or assemble(draft, template, ids)

    return [encode(draft) for draft in drafts]
