"""Roles, contents and thoughts of messages, under all names and forms that rows use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard

from llmtune.data.pictures import LOCATIONS, PICTURE_PARTS, PLACE
from llmtune.data.rejected_rows import RowError, json_kind, parse_cell, text_of

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
ROLE_KEYS = ("role", "from", "sender", "author", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message", "body")
"""Keys of a message, the most common first."""
CONVERSATIONS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold messages."""
USERS = (
    *("customer", "client", "user", "visitor", "guest", "caller", "patient", "student", "requester", "buyer", "member"),
)
ASSISTANTS = ("agent", "support", "operator", "advisor", "staff", "teacher", "doctor", "expert", "seller", "ai", "llm")
"""Common names of the two speakers."""


def first_key(turn: Mapping[str, object], keys: Sequence[str]) -> str | None:
    """Return the first of `keys` that a message has, or None."""
    for key in keys:
        if key in turn:
            return key
    return None


def with_roles(row: Mapping[str, object], roles: Mapping[str, Sequence[str]]) -> Mapping[str, object]:
    """Return a row with our role names in its messages; `roles` maps each of ours to the names in the rows."""
    ours = {name.strip().lower(): role for role, names in roles.items() for name in names}
    conversations = {name: read_turns(row[name]) for name in CONVERSATIONS if ours and name in row}
    return {
        **row,
        **{name: [_with_role(turn, ours) for turn in turns] for name, turns in conversations.items() if turns},
    }


def _with_role(turn: object, ours: Mapping[str, str]) -> object:
    key = first_key(turn, ROLE_KEYS) if isinstance(turn, dict) else None
    if key is None or not isinstance(turn, dict):
        return turn
    return {**turn, key: ours.get(str(turn[key]).strip().lower(), turn[key])}


def read_turns(value: object) -> list[object]:
    """Return the items of a list, or of a list written as JSON text; empty for anything else."""
    value = parse_cell(value)
    return value if isinstance(value, list) else []


def is_message(value: object) -> bool:
    """Whether a value looks like a message: it names a speaker."""
    return isinstance(value, dict) and first_key(value, ROLE_KEYS) is not None


def propose_roles(conversations: Sequence[Sequence[object]]) -> dict[str, list[str]]:
    """Return a mapping for unknown roles, guessed from their names; otherwise the first speaker is the user."""
    speakers = [list(_speakers(turns)) for turns in conversations]
    unknown = list(dict.fromkeys(name for names in speakers for name in names if name.strip().lower() not in ROLES))
    proposal: dict[str, list[str]] = {}
    left = []
    for name in unknown:
        role = "user" if name.lower() in USERS else "assistant" if name.lower() in ASSISTANTS else None
        if role is None:
            left.append(name)
        else:
            proposal.setdefault(role, []).append(name)
    if left and len(left) + len(proposal) == 2:
        first = Counter(names[0] for names in speakers if names).most_common(1)[0][0]
        for name in left:
            free = [role for role in ("user", "assistant") if role not in proposal]
            role = free[0] if len(free) == 1 else "user" if name == first else "assistant"
            proposal[role] = [name]
    return {role: proposal[role] for role in ("user", "assistant") if role in proposal}


def _speakers(turns: Sequence[object]) -> Iterator[str]:
    for turn in turns:
        key = first_key(turn, ROLE_KEYS) if isinstance(turn, dict) else None
        if key is not None and isinstance(turn, dict) and isinstance(name := turn[key], str):
            yield name


# Thoughts: as a field, a content part, `<think>`, or Harmony's channels


REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
"""Keys for the thoughts of a message, in data sets and APIs."""
THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"
"""The format of thoughts if a template shows no other: that of DeepSeek and Qwen."""

_THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_CHANNEL = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>(analysis|commentary|final)<\|message\|>(.*?)"
    r"(?:<\|end\|>|<\|return\|>|(?=<\|start\|>|<\|channel\|>)|\s*\Z)",
    re.DOTALL,
)


def split_reasoning(turn: Mapping[str, object], content: str, parts: str, where: str) -> tuple[str | None, str]:
    """Return the thoughts of an answer and its text without them.

    Args:
        turn: The message as it appears in the row.
        content: Its text.
        parts: Thoughts from parts of its content.
        where: The message's position, for the error.

    Raises:
        RowError: Thoughts are not text, or are given twice and differ.
    """
    present = [key for key in REASONING_KEYS if turn.get(key) is not None]
    stated = [text.strip() for key in present if (text := _thought_text(turn[key], f"{where}: {key!r}"))]
    stated += [parts.strip()] if parts.strip() else []
    inline, rest = _split_content(content)
    thoughts = list(dict.fromkeys([*stated, *([inline] if inline else [])]))
    if len(thoughts) > 1:
        raise RowError("thoughts twice", f"{where} has two that differ: {thoughts[0][:40]!r} and {thoughts[1][:40]!r}")
    return (thoughts[0] if thoughts else inline), rest


def _thought_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{what} is {json_kind(value)}; it must be text")
    return value


def _split_content(content: str) -> tuple[str | None, str]:
    """Split thoughts off the start of a text; an empty block of thoughts gives an empty text."""
    if block := _THINK_BLOCK.match(content):
        return block[1].strip(), block[2].lstrip()
    if "<|channel|>" not in content:
        return None, content
    texts: dict[str, list[str]] = {"analysis": [], "commentary": [], "final": []}
    at = 0
    while channel := _CHANNEL.match(content, at):
        texts[channel[1]].append(channel[2].strip())
        at = channel.end()
    if not at or content[at:].strip():
        return None, content
    answer = "\n\n".join([*texts["commentary"], *texts["final"]])
    return "\n\n".join(texts["analysis"]) or None, answer


# The parts of a content


def read_parts(content: list[object], where: str) -> tuple[str, str, list[object]]:
    """Return the text of a content with PLACE for each picture, its thoughts, and its pictures as the row states them.

    A picture is None if the part is only a place for it. Raises RowError.
    """
    thoughts = [_thought(part, where) for part in content if _is_thought(part)]
    texts = [_part_text(part, where) for part in content if not (_is_thought(part) or is_call(part))]
    return "".join(texts), "\n\n".join(thoughts), [_part_picture(part) for part in content if _is_picture(part)]


def _is_thought(part: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")


def is_call(part: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a part is a tool call."""
    return isinstance(part, dict) and part.get("type") == "tool_call"


def _thought(part: Mapping[str, object], where: str) -> str:
    """Read a content part with thoughts, in Anthropic's or Mistral's format."""
    value = part.get("thinking", part.get("reasoning", part.get("text", part.get("value"))))
    if isinstance(value, list):
        return "".join(_part_text(inner, where) for inner in value)
    return text_of(value, f"{where}: the thoughts in a part")


def _is_picture(part: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(part, dict) and part.get("type") in PICTURE_PARTS


def _part_text(part: object, where: str) -> str:
    """Return the text of a part; PLACE for a picture."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError("wrong type", f"{where}: a part of 'content' is {json_kind(part)}")
    if _is_picture(part):
        return PLACE
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        what = f"{where}: a part of type {kind!r}; only texts and pictures can be trained on so far"
        raise RowError("content that is not text", what)
    return text_of(part.get("text", part.get("value")), f"{where}: 'text' of a part")


def _part_picture(part: Mapping[str, object]) -> object:
    """Return the picture of a part as the row states it; None for a place without one."""
    return part if any(part.get(key) is not None for key in LOCATIONS) else None
