"""Rows of chat and completion: conversations checked and normalised, prompts with completions, plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from llmtune.data.message_fields import (
    CONTENT_KEYS,
    REASONING_KEYS,
    ROLE_KEYS,
    ROLES,
    THINK_CLOSE,
    THINK_OPEN,
    first_key,
    is_call,
    read_parts,
    split_reasoning,
)
from llmtune.data.pictures import IMAGE, Picture, place_pictures, read_pictures
from llmtune.data.rejected_rows import RowError, json_kind, nonempty_text, text_of
from llmtune.data.row_text import RowInput, plain_form
from llmtune.errors import nearest
from llmtune.records import Row

MAX_MESSAGES = 1000
MAX_PREFIXES = 2**29
"""Limit on messages times characters: each answer is rendered with everything before it."""
WEIGHT_KEYS = ("train", "weight", "loss_weight")
"""Keys that say whether a message is learned, the last two as 0 or 1: OpenAI's, and LLaMA-Factory's."""
MESSAGE_KEYS = frozenset(
    {*ROLE_KEYS, *CONTENT_KEYS, *WEIGHT_KEYS, *REASONING_KEYS} | {"tool_calls", "function_call", "tool_call_id", "name"}
)
TRAIN_REASONING = ("learn", "keep", "drop")


class Function(TypedDict):
    """The function that a tool call names, with its arguments."""

    name: str
    arguments: dict[str, object]


class ToolCall(TypedDict):
    """A tool call in the form that chat templates expect."""

    type: str
    function: Function
    id: NotRequired[str]


class Tool(TypedDict):
    """The description of a tool, in OpenAI's form."""

    type: str
    function: dict[str, object]


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    content: str
    train: NotRequired[bool]
    """Whether to train on an answer; true if missing."""
    reasoning: NotRequired[str]
    """The thoughts before an answer, without their marks; empty if the row states that there were none."""
    reasoning_content: NotRequired[str]
    """The same under the templates' name (`llmtune.data.chat_messages.clean_messages`); rows never have it."""
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    images: NotRequired[list[Picture]]
    """One for each PLACE in `content`, in order; only users' messages have them."""


class ChatRow(TypedDict):
    """A conversation and the tools available to it."""

    messages: list[Message]
    tools: NotRequired[list[Tool]]
    train_reasoning: NotRequired[str]
    """How to treat its thoughts; overrides `data.reasoning`."""


class CompletionRow(TypedDict):
    """A prompt, which may be empty, and the text that continues it."""

    prompt: str
    completion: str


def chat_from_messages(row: Mapping[str, object]) -> ChatRow:
    """Read `messages` (or ShareGPT's `conversations`) with the row's tools, system message and thoughts."""
    tools = row.get("tools")
    value = row["messages"] if "messages" in row else row["conversations"]
    chat = canonical_messages(
        value, tools if tools is not None else row.get("functions"), row.get("system"), row.get("images")
    )
    stated = row.get("train_reasoning")
    if stated is None:
        return chat
    if stated not in TRAIN_REASONING:
        hint = nearest(str(stated), TRAIN_REASONING)
        what = f"'train_reasoning' is {stated!r}; it must be {' or '.join(TRAIN_REASONING)}.{hint}"
        raise RowError("wrong value", what)
    return {**chat, "train_reasoning": str(stated)}


def chat_from_alpaca(row: Mapping[str, object]) -> ChatRow:
    """Read `instruction`, `input`, `output`, and the earlier turns in `history`."""
    history = row.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history)):
        raise RowError("wrong type", "'history' must be a list of [question, answer] pairs")
    turns = [*(turn for pair in history for turn in pair), _alpaca_prompt(row), nonempty_text(row, "output")]
    return chat_from_messages({**row, "messages": _alternate(turns)})


def completion_from_alpaca(row: Mapping[str, object]) -> CompletionRow:
    """Read an instruction as a text to continue."""
    system = row.get("system")
    head = f"{text_of(system, repr('system'))}\n\n" if system else ""
    return {"prompt": f"{head}{_alpaca_prompt(row)}\n\n", "completion": nonempty_text(row, "output")}


def chat_from_pair(row: Mapping[str, object]) -> ChatRow:
    """Read `prompt` and `completion`, each text or a list of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in prompt]
        return chat_from_messages({**row, "messages": [*context, *completion]})
    texts = [nonempty_text(row, "prompt"), nonempty_text(row, "completion")]
    return chat_from_messages({**row, "messages": _alternate(texts)})


def completion_from_pair(row: Mapping[str, object]) -> CompletionRow:
    """Read `prompt`, which may be empty, and `completion`."""
    return {"prompt": text_of(row["prompt"], "'prompt'"), "completion": nonempty_text(row, "completion")}


def completion_from_text(row: Mapping[str, object]) -> CompletionRow:
    """Read `text`."""
    return {"prompt": "", "completion": nonempty_text(row, "text")}


def chat_from_picture(row: Mapping[str, object]) -> ChatRow:
    """Read `image`, `answer`, and `question`, without which the picture alone is the user's message."""
    question = row.get("question")
    text = "" if question is None else text_of(question, "'question'")
    turns = _alternate([text if text.strip() else IMAGE, nonempty_text(row, "answer")])
    return chat_from_messages({**row, "messages": turns, "images": row["image"]})


def _alpaca_prompt(row: Mapping[str, object]) -> str:
    extra = row.get("input")
    instruction = nonempty_text(row, "instruction")
    if extra is not None and (text := text_of(extra, "'input'")).strip():
        return f"{instruction}\n\n{text}"
    return instruction


def _alternate(turns: Sequence[object]) -> list[object]:
    """Return messages with alternating roles, user first."""
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def canonical_messages(value: object, tools: object = None, system: object = None, images: object = None) -> ChatRow:
    """Check a conversation and return it as a canonical chat row, but for its pictures (`read_pictures`).

    Args:
        value: A list of messages, `role`/`content` (OpenAI) or `from`/`value` (ShareGPT), or the same as JSON text.
        tools: A list of function descriptions, bare or wrapped in OpenAI's `{"type": "function", ...}`, or JSON text.
        system: A system message outside the list.
        images: Pictures outside the list, or one.

    Raises:
        RowError: The row cannot be trained on.
    """
    turns = json_cell(value, "messages")
    if not isinstance(turns, list):
        raise RowError("wrong type", f"'messages' is {json_kind(turns)}; it must be a list of messages")
    if not turns:
        raise RowError("no messages", "the list of messages is empty")
    if len(turns) > MAX_MESSAGES:
        raise RowError("too many messages", f"{len(turns):,}; a conversation has up to {MAX_MESSAGES:,}")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if system not in (None, ""):
        messages.insert(0, {"role": "system", "content": text_of(system, "'system'")})
    letters = sum(len(message["content"]) for message in messages)
    if len(messages) * letters > MAX_PREFIXES:
        raise RowError("too large", f"{len(messages):,} messages with {letters:,} characters")
    _check_order(messages)
    place_pictures(messages, images)
    row: ChatRow = {"messages": messages}
    if described := _tools(tools):
        row["tools"] = described
    return row


def open_conversation(
    value: object,
    tools: object = None,
    system: object = None,
    images: object = None,
    *,
    folder: Path | None = None,
    reads_pictures: bool = False,
) -> ChatRow:
    """Check a conversation that awaits an answer, and return it as a row; an answer at its end is left out.

    Messages and their order are checked as in training: a placeholder answer is appended for the check. `folder` is the
    base of paths of pictures (`read_picture`). Pictures are refused unless the model `reads_pictures`.
    """
    turns = json_cell(value, "messages")
    if isinstance(turns, list):
        last = turns[-1] if turns else None
        role = last.get(first_key(last, ROLE_KEYS)) if isinstance(last, dict) else None
        if isinstance(role, str) and ROLES.get(role.strip().lower()) == "assistant":
            turns = turns[:-1]
        turns = [*turns, {"role": "assistant", "content": "-"}]
    row = canonical_messages(turns, tools, system, images)
    if not reads_pictures and any("images" in message for message in row["messages"]):
        raise RowError("content that is not text", "a message has a picture; only texts are read")
    read_pictures(row["messages"], folder)
    row["messages"].pop()
    if not row["messages"] or row["messages"][-1]["role"] == "system":
        raise RowError("no question", "no message or only a system message; add a user message")
    return row


def _message(turn: object, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(turn, dict):
        raise RowError("wrong type", f"{where} is {json_kind(turn)}; it must be an object with 'role' and 'content'")
    stated = turn.get(first_key(turn, ROLE_KEYS))
    role = ROLES.get(stated.strip().lower()) if isinstance(stated, str) else None
    if role is None:
        raise _role_error(stated, where)
    content = turn.get(first_key(turn, CONTENT_KEYS))
    calls = _tool_calls(turn, where)
    if stated == "function_call":
        calls, content = [_call(json_cell(content, f"{where}: the function call"), where)], ""
    message = _said(turn, content, where, role, bool(calls))
    for key in WEIGHT_KEYS:
        if (train := turn.get(key)) is not None:
            if train not in (0, 1):
                allowed = "true or false" if key == "train" else "0 or 1"
                raise RowError("wrong type", f"{where}: {key!r} is {train!r}; it must be {allowed}")
            message.setdefault("train", bool(train))
    if calls:
        message["tool_calls"] = calls
    if turn.get("tool_call_id") is not None:
        message["tool_call_id"] = text_of(turn["tool_call_id"], f"{where}: 'tool_call_id'")
    if turn.get("name") is not None:
        message["name"] = text_of(turn["name"], f"{where}: 'name'")
    return message


def _role_error(stated: object, where: str) -> RowError:
    if stated is None:
        return RowError("unknown role", f"{where} has no 'role'")
    if not isinstance(stated, str):
        return RowError("wrong type", f"{where}: 'role' is {json_kind(stated)}; it must be text")
    roles = ("system", "developer", "user", "assistant", "tool")
    hint = nearest(stated, roles) or f" Map it in the section `data`, such as `roles: {{user: {stated}}}`."
    return RowError("unknown role", f"{where}: {stated!r} is none of {', '.join(roles)}.{hint}")


def _said(turn: Mapping[str, object], content: object, where: str, role: str, calls: bool) -> Message:
    """Return a message with its content, and its thoughts and pictures if it has any."""
    thoughts, images = "", list[object]()
    if isinstance(content, list):
        content, thoughts, images = read_parts(content, where)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise RowError(
            "wrong type", f"{where}: {first_key(turn, CONTENT_KEYS)!r} is {json_kind(content)}; it must be text"
        )
    message: Message = {"role": role, "content": content}
    if images:
        message["images"] = cast(list[Picture], images)  # as stated, until `read_pictures`
    if role == "assistant":
        reasoning, message["content"] = split_reasoning(turn, content, thoughts, where)
        if reasoning is not None:
            message["reasoning"] = reasoning
    elif thoughts or any(turn.get(key) for key in REASONING_KEYS):
        raise RowError("thoughts outside an answer", f"{where} is from the {role}, and only answers may have thoughts")
    if not message["content"].strip() and role in ("user", "assistant") and not calls:
        raise RowError("empty content", f"{where} ({role}) has no content")
    return message


def answer_as_text(answer: Message) -> str:
    """Return an answer as one text that includes its thoughts."""
    return (
        f"{THINK_OPEN}{answer['reasoning']}{THINK_CLOSE}{answer['content']}"
        if "reasoning" in answer
        else answer["content"]
    )


def answer_message(text: str) -> Message:
    """Return the message for an answer given as one text."""
    reasoning, content = split_reasoning({}, text, "", "the answer")
    message: Message = {"role": "assistant", "content": content}
    return message if reasoning is None else {**message, "reasoning": reasoning}


def write_answer(text: str, calls: Sequence[ToolCall]) -> str:
    """Format an answer for display: its text, then a line for each call."""
    lines = [f"{name}({json.dumps(arguments, ensure_ascii=False)})" for name, arguments in map(read_call, calls)]
    return "\n".join([*([text] if text else []), *lines])


def read_call(call: ToolCall) -> tuple[str, dict[str, object]]:
    """Return name and arguments of a call."""
    return call["function"]["name"], call["function"]["arguments"]


def _tool_calls(turn: Mapping[str, object], where: str) -> list[ToolCall]:
    calls = json_cell(turn.get("tool_calls"), f"{where}: 'tool_calls'")
    if not calls and turn.get("function_call"):
        calls = [json_cell(turn["function_call"], f"{where}: 'function_call'")]
    if not calls and isinstance(parts := turn.get("content"), list):
        calls = [json_cell(part.get("value"), f"{where}: a call in a part") for part in parts if is_call(part)]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowError("wrong type", f"{where}: 'tool_calls' is {json_kind(calls)}; it must be a list")
    return [_call(call, where) for call in calls]


def _call(call: object, where: str) -> ToolCall:
    """Return a call with its arguments as an object, the form that chat templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("malformed tool call", f"{where}: a tool call needs a function with a 'name' and 'arguments'")
    arguments = json_cell(function.get("arguments") or {}, f"{where}: the arguments of {function['name']!r}")
    if not isinstance(arguments, dict):
        raise RowError(
            "malformed tool call", f"{where}: the arguments of {function['name']!r} are {json_kind(arguments)}"
        )
    named: Function = {"name": function["name"], "arguments": arguments}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        return {"id": call["id"], "type": "function", "function": named}
    return {"type": "function", "function": named}


def _tools(tools: object) -> list[Tool]:
    described = json_cell(tools, "'tools'")
    if not described:
        return []
    if not isinstance(described, list):
        raise RowError("wrong type", f"'tools' is {json_kind(described)}; it must be a list of function descriptions")
    return [_tool(tool, number) for number, tool in enumerate(described, 1)]


def _tool(tool: object, number: int) -> Tool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("malformed tool", f"tool {number} has no function with a 'name'")
    return {"type": "function", "function": function}


def _check_order(messages: Sequence[Message]) -> None:
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


def json_cell(value: object, what: str) -> object:
    """Parse JSON text, which tables use in place of a list or object."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        parsed: object = json.loads(value)
    except (ValueError, RecursionError):
        raise RowError("wrong type", f"{what} is text, but not JSON") from None
    return parsed


def text_input(row: Row) -> RowInput:
    """Return the prompt; of a text without a prompt, the text itself."""
    if row["prompt"].strip():
        return RowInput(row["prompt"], str, lambda: plain_form(row["completion"]))
    return RowInput(row["completion"], str, str)
