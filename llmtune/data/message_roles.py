"""Who speaks in a message: the roles that rows use, mapped to those of chat templates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

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
"""Keys of a message, the most usual first."""
CONVERSATIONS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold messages."""
USERS = (
    *("customer", "client", "user", "visitor", "guest", "caller", "patient", "student", "requester", "buyer", "member"),
)
ASSISTANTS = ("agent", "support", "operator", "advisor", "staff", "teacher", "doctor", "expert", "seller", "ai", "llm")
"""Usual names of the two who speak."""


def first_key(turn: Mapping[str, object], keys: Sequence[str]) -> str | None:
    """Return the first of `keys` that a message has."""
    return next((key for key in keys if key in turn), None)


def with_roles(row: Mapping[str, object], roles: Mapping[str, Sequence[str]]) -> Mapping[str, object]:
    """Return a row whose messages have our roles; `roles` maps each of ours to the names that the rows use."""
    ours = {name.strip().lower(): role for role, names in roles.items() for name in names}
    turns = {name: read_turns(row[name]) for name in CONVERSATIONS if ours and name in row}
    return {**row, **{name: [_with_role(turn, ours) for turn in found] for name, found in turns.items() if found}}


def _with_role(turn: object, ours: Mapping[str, str]) -> object:
    key = first_key(turn, ROLE_KEYS) if isinstance(turn, dict) else None
    if key is None or not isinstance(turn, dict):
        return turn
    return {**turn, key: ours.get(str(turn[key]).strip().lower(), turn[key])}


def read_turns(value: object) -> list[object]:
    """Return the items of a list, or of a list written as JSON text; none of anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def is_message(value: object) -> bool:
    """Whether a value looks like a message: it says who speaks."""
    return isinstance(value, dict) and first_key(value, ROLE_KEYS) is not None


def propose_roles(conversations: Sequence[Sequence[object]]) -> dict[str, list[str]]:
    """Return a mapping of the roles that are not known, by their names; else the one who speaks first is the user."""
    speakers = [list(_speakers(turns)) for turns in conversations]
    unknown = list(dict.fromkeys(name for names in speakers for name in names if name.strip().lower() not in ROLES))
    found: dict[str, list[str]] = {}
    left = []
    for name in unknown:
        role = "user" if name.lower() in USERS else "assistant" if name.lower() in ASSISTANTS else None
        if role is None:
            left.append(name)
        else:
            found.setdefault(role, []).append(name)
    if left and len(left) + len(found) == 2:
        first = Counter(names[0] for names in speakers if names).most_common(1)[0][0]
        for name in left:
            free = [role for role in ("user", "assistant") if role not in found]
            role = free[0] if len(free) == 1 else "user" if name == first else "assistant"
            found[role] = [name]
    return {role: found[role] for role in ("user", "assistant") if role in found}


def _speakers(turns: Sequence[object]) -> Iterator[str]:
    for turn in turns:
        key = first_key(turn, ROLE_KEYS) if isinstance(turn, dict) else None
        if key is not None and isinstance(turn, dict) and isinstance(name := turn[key], str):
            yield name
