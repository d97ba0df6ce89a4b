"""Rows of tasks that need no answer: conversations that may end with a question, and prompts alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmtune.data.chat_rows import ChatRow, chat_from_messages, chat_from_pair, json_cell
from llmtune.data.message_fields import ROLE_KEYS, ROLES, first_key
from llmtune.recipe.format_names import PROMPT_ALONE

UNANSWERED = ("user", "tool")
"""Roles of the last message of a conversation without an answer."""


def prompt_from_messages(row: Mapping[str, object]) -> ChatRow:
    """Read a conversation as `chat_from_messages` does; its last answer may be missing."""
    column = "messages" if "messages" in row else "conversations"
    turns = json_cell(row[column], "messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    role = last.get(first_key(last, ROLE_KEYS)) if isinstance(last, dict) else None
    if not isinstance(turns, list) or not isinstance(role, str) or ROLES.get(role.strip().lower()) not in UNANSWERED:
        return chat_from_messages(row)
    chat = chat_from_messages(
        {**row, column: [*turns, {"role": "assistant", "content": "-"}]}
    )  # checked with an answer
    return {**chat, "messages": chat["messages"][:-1]}


def prompt_from_pair(row: Mapping[str, object]) -> ChatRow:
    """Read `prompt`, text or a list of messages, and `completion` unless it is missing or empty."""
    if row.get("completion") not in (None, "", []):
        return chat_from_pair(row)
    if isinstance(row["prompt"], list):
        return prompt_from_messages({**row, "messages": row["prompt"]})
    chat = chat_from_pair({**row, "completion": "-"})
    return {**chat, "messages": chat["messages"][:-1]}


OPEN_PARSERS: Mapping[str, Callable[[Mapping[str, object]], ChatRow]] = {
    "messages": prompt_from_messages,
    "sharegpt": prompt_from_messages,
    "prompt-completion": prompt_from_pair,
    PROMPT_ALONE: prompt_from_pair,
}
"""By row format, the parsers that replace those of conversations."""
