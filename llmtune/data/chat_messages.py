"""Messages of rows as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import cast

from llmtune.data.chat_rows import Message, ToolCall

OURS = ("train", "reasoning")
"""Keys of a row's message that templates do not know."""
SHORT_ID = 9
"""Letters and digits of a call's id in Mistral's templates."""


def clean(messages: Sequence[Mapping[str, object]], drop_reasoning: bool = False) -> list[Message]:
    """Return messages as templates take them: text for content, arguments as objects, thoughts as `reasoning_content`.

    transformers hands thoughts on under the other names that templates have for them.
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
    """Write the arguments of calls as JSON texts, for templates that copy them as they are."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return cast(Message, {**message, "tool_calls": calls})


def with_short_ids(message: Message) -> Message:
    """Make the ids of calls, here or answered here, nine letters and digits long, as Mistral's templates ask for."""
    copy = cast(Message, {**message})
    if "tool_call_id" in message:
        copy["tool_call_id"] = _short(message["tool_call_id"])
    if calls := message.get("tool_calls"):
        copy["tool_calls"] = [{**call, "id": _short(call["id"])} if "id" in call else call for call in calls]
    return copy


def _short(call_id: str) -> str:
    fits = len(call_id) == SHORT_ID and call_id.isalnum()
    return call_id if fits else sha256(call_id.encode()).hexdigest()[:SHORT_ID]


def _with_arguments(call: ToolCall) -> ToolCall:
    """Return a tool call with its arguments as an object, as templates take them; OpenAI's format has JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(cast(str, function["arguments"]))
    except ValueError:
        return call
    return cast(ToolCall, {**call, "function": {**function, "arguments": arguments}})
