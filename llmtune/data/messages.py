"""Chat messages: checked, and brought into one form whatever dialect they came in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmtune.data.file_readers import describe
from llmtune.errors import nearest

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name; templates know only `system`
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
MESSAGE_KEYS = frozenset(
    {"role", "content", "from", "value", "train", "weight", "tool_calls", "function_call", "tool_call_id", "name"}
)


class RowError(Exception):
    """A bad row: `reason` is the kind of mistake, by which rows are counted; `detail` says what exactly is wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def canonical_messages(value: object, tools: object = None, system: object = None) -> dict[str, Any]:
    """Check a conversation and return the canonical chat row.

    Args:
        value: A list of messages, `role`/`content` (OpenAI) or `from`/`value` (ShareGPT), or the same as JSON text.
        tools: A list of function descriptions, bare or wrapped in OpenAI's `{"type": "function", ...}`, or JSON text.
        system: A system message that stands outside the list.

    Raises:
        RowError: The row cannot be trained on.
    """
    turns = _parsed(value, "messages")
    if not isinstance(turns, list):
        raise RowError("wrong type", f"'messages' is {describe(turns)}; it must be a list of messages")
    if not turns:
        raise RowError("no messages", "the list of messages is empty")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if system not in (None, ""):
        messages.insert(0, {"role": "system", "content": text_of(system, "'system'")})
    _check_order(messages)
    row: dict[str, Any] = {"messages": messages}
    described = _tools(tools)
    if described:
        row["tools"] = described
    return row


def _message(turn: object, number: int) -> dict[str, Any]:
    place = f"message {number}"
    if not isinstance(turn, dict):
        raise RowError("wrong type", f"{place} is {describe(turn)}; it must be an object with 'role' and 'content'")
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise _role_error(said, place)
    content = turn.get("content", turn.get("value"))
    calls = _tool_calls(turn, place)
    if said == "function_call":
        calls, content = [_call(_parsed(content, f"{place}: the function call"), place)], ""
    message: dict[str, Any] = {"role": role, "content": _content(content, place, role, bool(calls))}
    train = turn.get("train", turn.get("weight"))  # OpenAI's fine-tuning format says weight: 0 or 1
    if train is not None:
        if train not in (0, 1):
            raise RowError("wrong type", f"{place}: 'train' is {train!r}; it must be true or false")
        message["train"] = bool(train)
    if calls:
        message["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if turn.get(key) is not None:
            message[key] = text_of(turn[key], f"{place}: '{key}'")
    return message


def _role_error(said: object, place: str) -> RowError:
    if said is None:
        return RowError("unknown role", f"{place} has no 'role'")
    if not isinstance(said, str):
        return RowError("wrong type", f"{place}: 'role' is {describe(said)}; it must be text")
    known = ("system", "developer", "user", "assistant", "tool")
    return RowError("unknown role", f"{place}: {said!r} is none of {', '.join(known)}.{nearest(said, known)}")


def _content(content: object, place: str, role: str, calls: bool) -> str:
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise RowError("wrong type", f"{place}: 'content' is {describe(content)}; it must be text")
    if not content.strip() and role in ("user", "assistant") and not calls:
        raise RowError("empty content", f"{place} ({role}) says nothing")
    return content


def _part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError("wrong type", f"{place}: a part of 'content' is {describe(part)}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(
            "content that is not text", f"{place}: a part of type {kind!r}; only text can be trained on so far"
        )
    return text_of(part.get("text"), f"{place}: 'text' of a part")


def _tool_calls(turn: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    calls = _parsed(turn.get("tool_calls"), f"{place}: 'tool_calls'")
    if not calls and turn.get("function_call"):
        calls = [_parsed(turn["function_call"], f"{place}: 'function_call'")]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowError("wrong type", f"{place}: 'tool_calls' is {describe(calls)}; it must be a list")
    return [_call(call, place) for call in calls]


def _call(call: object, place: str) -> dict[str, Any]:
    """Return a call with its arguments as an object, which is what chat templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("malformed tool call", f"{place}: a tool call needs a function with a 'name' and 'arguments'")
    arguments = _parsed(function.get("arguments") or {}, f"{place}: the arguments of {function['name']!r}")
    if not isinstance(arguments, dict):
        raise RowError(
            "malformed tool call", f"{place}: the arguments of {function['name']!r} are {describe(arguments)}"
        )
    result: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        result = {"id": call["id"], **result}
    return result


def _tools(tools: object) -> list[dict[str, Any]]:
    described = _parsed(tools, "'tools'")
    if not described:
        return []
    if not isinstance(described, list):
        raise RowError("wrong type", f"'tools' is {describe(described)}; it must be a list of function descriptions")
    return [_tool(tool, number) for number, tool in enumerate(described, 1)]


def _tool(tool: object, number: int) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("malformed tool", f"tool {number} has no function with a 'name'")
    return {"type": "function", "function": function}


def _check_order(messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    if roles.count("system") > 1:
        second = [number for number, role in enumerate(roles, 1) if role == "system"][1]
        raise RowError("two system messages", f"message {second} is a second one; join them")
    if "system" in roles and roles[0] != "system":
        raise RowError("system message not first", f"it is message {roles.index('system') + 1}")
    if "assistant" not in roles:
        raise RowError("no assistant answer", "no message is from the assistant, so there is nothing to learn")
    if roles[-1] != "assistant":
        raise RowError("does not end with an answer", f"the last message is from {roles[-1]}; cut it or add the answer")
    if all(message.get("train") is False for message in messages if message["role"] == "assistant"):
        raise RowError("no assistant answer", "every assistant message says train: false")


def _parsed(value: object, what: str) -> object:
    """Read JSON text where tables have it in place of a list or object."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        parsed: object = json.loads(value)
    except (ValueError, RecursionError):
        raise RowError("wrong type", f"{what} is text, and not JSON") from None
    return parsed


def text_of(value: object, what: str) -> str:
    """Return `value` if it is text.

    Raises:
        RowError: It is something else.
    """
    if not isinstance(value, str):
        raise RowError("wrong type", f"{what} is {describe(value)}; it must be text")
    return value
