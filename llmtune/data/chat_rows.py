"""Rows of chat and completion: conversations, instructions, prompts with their completions, bare text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.data.messages import RowError, canonical_messages, text_of
from llmtune.records import Row


def chat_from_messages(row: Mapping[str, Any]) -> Row:
    """Read `messages`, and `tools` (or `functions`) and `system` if they are there."""
    tools = row.get("tools")
    return canonical_messages(row["messages"], tools if tools is not None else row.get("functions"), row.get("system"))


def chat_from_sharegpt(row: Mapping[str, Any]) -> Row:
    """Read `conversations`."""
    return canonical_messages(row["conversations"], row.get("tools"), row.get("system"))


def chat_from_alpaca(row: Mapping[str, Any]) -> Row:
    """Read `instruction`, `input`, `output` and the turns before them in `history`."""
    history = row.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history)):
        raise RowError("wrong type", "'history' must be a list of [question, answer] pairs")
    turns = [*(turn for pair in history for turn in pair), _alpaca_prompt(row), filled(row, "output")]
    return _conversation(turns, row)


def completion_from_alpaca(row: Mapping[str, Any]) -> Row:
    """Read an instruction as text to go on from."""
    system = row.get("system")
    head = f"{text_of(system, repr('system'))}\n\n" if system else ""
    return {"prompt": f"{head}{_alpaca_prompt(row)}\n\n", "completion": filled(row, "output")}


def chat_from_pair(row: Mapping[str, Any]) -> Row:
    """Read `prompt` and `completion`, texts or lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = [{**turn, "train": False} if isinstance(turn, dict) else turn for turn in prompt]
        return canonical_messages([*asked, *completion], row.get("tools"), row.get("system"))
    return _conversation([filled(row, "prompt"), filled(row, "completion")], row)


def completion_from_pair(row: Mapping[str, Any]) -> Row:
    """Read `prompt` (may be empty) and `completion`."""
    return {"prompt": text_of(row["prompt"], "'prompt'"), "completion": filled(row, "completion")}


def completion_from_text(row: Mapping[str, Any]) -> Row:
    """Read `text`."""
    return {"prompt": "", "completion": filled(row, "text")}


def filled(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column that must not be empty; raises RowError."""
    value = row.get(column)
    text = "" if value is None else text_of(value, f"'{column}'")
    if not text.strip():
        answer = column in ("completion", "output", "target", "summary", "chosen", "rejected")
        raise RowError("no answer" if answer else "empty content", f"'{column}' is empty")
    return text


def _alpaca_prompt(row: Mapping[str, Any]) -> str:
    extra = row.get("input")
    parts = [filled(row, "instruction")]
    if extra is not None and text_of(extra, "'input'").strip():
        parts.append(extra)
    return "\n\n".join(parts)


def _conversation(turns: Sequence[object], row: Mapping[str, Any]) -> Row:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return canonical_messages(messages, row.get("tools"), row.get("system"))
