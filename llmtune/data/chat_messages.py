"""Converts messages of rows to the templates' form, with special tokens in them as plain text.

A row therefore cannot inject a turn marker. The marks around such tokens are transformers' own
(`apply_chat_template(..., sanitize_control_tokens=True)`): private-use characters that pass through the template and
are removed before encoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TypeVar, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from llmtune.data.chat_rows import Message, ToolCall
from llmtune.data.pictures import PLACE, Picture

OURS = ("train", "reasoning")
"""Keys of a row's message that templates do not know."""
SHORT_ID = 9
"""Length of a call's id in Mistral's templates: letters and digits."""


def clean_messages(messages: Sequence[Mapping[str, object]], drop_reasoning: bool = False) -> list[Message]:
    """Return messages in the templates' form: content as text, arguments as objects, thoughts in `reasoning_content`.

    transformers also passes the thoughts under the other names that templates use.
    """
    cleaned = []
    for message in messages:
        copy = cast(Message, {key: value for key, value in message.items() if key not in OURS})
        copy["content"] = copy.get("content") or ""
        if "reasoning" in message and not drop_reasoning:
            copy["reasoning_content"] = cast(str, message["reasoning"])
        if calls := copy.get("tool_calls"):
            copy["tool_calls"] = [_with_arguments(call) for call in calls]
        cleaned.append(copy)
    return cleaned


def with_argument_texts(message: Message) -> Message:
    """Write the arguments of calls as JSON text, for templates that copy them unchanged."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return cast(Message, {**message, "tool_calls": calls})


def list_pictures(messages: Sequence[Mapping[str, object]]) -> list[Picture]:
    """Return the pictures of a conversation, in the order of their places."""
    pictured = (message["images"] for message in messages if "images" in message)
    return [picture for pictures in pictured for picture in cast(list[Picture], pictures)]


def with_image_parts(message: Mapping[str, object]) -> Mapping[str, object]:
    """Return a message with pictures in the templates' form: its content as a list of texts and places of pictures."""
    if "images" not in message:
        return message
    first, *others = cast(str, message["content"]).split(PLACE)
    parts: list[object] = [{"type": "text", "text": first}] if first else []
    for text in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return {**{key: value for key, value in message.items() if key != "images"}, "content": parts}


def with_short_ids(message: Message) -> Message:
    """Make the ids of calls and of their results nine letters and digits long, which Mistral's templates require."""
    copy = cast(Message, {**message})
    if "tool_call_id" in message:
        copy["tool_call_id"] = _short_id(message["tool_call_id"])
    if calls := message.get("tool_calls"):
        copy["tool_calls"] = [{**call, "id": _short_id(call["id"])} if "id" in call else call for call in calls]
    return copy


def _short_id(call_id: str) -> str:
    fits = len(call_id) == SHORT_ID and call_id.isalnum()
    return call_id if fits else sha256(call_id.encode()).hexdigest()[:SHORT_ID]


def _with_arguments(call: ToolCall) -> ToolCall:
    """Return a tool call with its arguments as an object; OpenAI's format has JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(cast(str, function["arguments"]))
    except (ValueError, RecursionError):
        return call
    return cast(ToolCall, {**call, "function": {**function, "arguments": arguments}})


# Special tokens


T = TypeVar("T")
MARKS = tuple(mark_control_tokens("x", re.compile("x")).split("x"))
"""Text before and after a token that is encoded as plain text."""
TEXTS = ("content", "reasoning", "reasoning_content")


class UnwritableTextError(Exception):
    """The tokenizer turns the text into a special token despite its marks; the message names it."""


def control_pattern(processor: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """Return a pattern for the tokens that text must not produce: special tokens, and added ones in the template.

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
    """Return the first special token in the texts of a conversation."""
    match = pattern.search(joined_text(messages, tools))
    return match[0] if match else None


def joined_text(messages: Sequence[Mapping[str, object]], tools: object = None) -> str:
    """Return all texts of a conversation, joined."""
    texts = [str(message[key]) for message in messages for key in TEXTS if message.get(key)]
    calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
    if calls or tools:
        texts.append(json.dumps([calls, tools], ensure_ascii=False))
    return "\0".join(texts)


def mark(value: T, pattern: re.Pattern[str]) -> T:
    """Mark the special tokens in all texts of messages or tools."""
    return cast(T, mark_control_tokens(value, pattern))


def is_marked(text: str) -> bool:
    """Whether a text contains marks."""
    return MARKS[0] in text or MARKS[1] in text


def unmark(text: str) -> str:
    """Return a text without marks."""
    return text.replace(MARKS[0], "").replace(MARKS[1], "")


def encode_marked(processor: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text, with marked tokens encoded as plain text.

    Raises:
        UnwritableTextError: this tokenizer cannot write a special token as text.
    """
    try:
        return list(encode_marked_chat(processor, text))
    except ValueError as error:
        raise UnwritableTextError(str(error)) from error
