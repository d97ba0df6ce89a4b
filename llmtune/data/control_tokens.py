"""Special tokens in what people and models say: written as plain text, so that nobody can write a turn marker.

The marks around them are transformers' own (`apply_chat_template(..., sanitize_control_tokens=True)`): private
characters, which pass through the template and are gone from the ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

T = TypeVar("T")
MARKS = tuple(mark_control_tokens("x", re.compile("x")).split("x"))
"""What stands before and behind a token that is to be plain text."""
TEXTS = ("content", "reasoning", "reasoning_content")


class UnwritableTextError(Exception):
    """The tokenizer makes a special token of text, whatever is done; the text names it."""


def control_pattern(processor: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """Return what finds the tokens that text must not write: special ones, and added ones that the template writes.

    Other added tokens, such as words of `model.add_tokens`, are text.
    """
    special = {*processor.all_special_tokens}
    added = processor.added_tokens_decoder.values()
    special |= {token.content for token in added if token.special or token.content in template}
    named = sorted((token for token in special if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, named)) or "(?!)")


def find_control_token(
    pattern: re.Pattern[str], messages: Sequence[Mapping[str, object]], tools: object = None
) -> str | None:
    """Return the first special token that the texts of a conversation hold."""
    found = pattern.search(joined_text(messages, tools))
    return found[0] if found else None


def joined_text(messages: Sequence[Mapping[str, object]], tools: object = None) -> str:
    """Return all texts of a conversation in one."""
    texts = [str(message[key]) for message in messages for key in TEXTS if message.get(key)]
    calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
    if calls or tools:
        texts.append(json.dumps([calls, tools], ensure_ascii=False))
    return "\0".join(texts)


def mark(value: T, pattern: re.Pattern[str]) -> T:
    """Mark the special tokens in all texts of messages or tools."""
    return cast(T, mark_control_tokens(value, pattern))


def is_marked(text: str) -> bool:
    """Whether there are marks in a text."""
    return MARKS[0] in text or MARKS[1] in text


def unmark(text: str) -> str:
    """Return a text without marks."""
    return text.replace(MARKS[0], "").replace(MARKS[1], "")


def encode_marked(processor: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text, those of marked tokens as plain text.

    Raises:
        UnwritableTextError: this tokenizer cannot write a special token as text.
    """
    try:
        return list(encode_marked_chat(processor, text))
    except ValueError as error:
        raise UnwritableTextError(str(error)) from error
