"""Rows as the documentation of some tools wants them. Standard library only."""

from __future__ import annotations

import json
import re
from typing import Any

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TAGS |= {"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
SHAREGPT: dict[str, dict[str, Any]] = {
    "messages": {"formatting": "sharegpt", "tags": TAGS, "columns": {"messages": "messages", "tools": "tools"}},
    "text": {"columns": {"prompt": "text"}},
    "pictures": {
        "formatting": "sharegpt",
        "tags": TAGS,
        "columns": {"messages": "messages", "images": "images"},
    },
    "preference": {
        "formatting": "sharegpt",
        "tags": TAGS,
        "ranking": True,
        "columns": {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"},
    },
}
"""Kind of rows -> entry of LLaMA-Factory's dataset_info.json."""


def as_conversation(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job for tools that have conversations only: a completion is the last answer."""
    if job["kind"] != "prompt_completion":
        return job
    return job | {"kind": "messages", "train_on": "last" if job["column"] == "documented" else "assistant"}


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """Write a prompt and its completion as one conversation."""
    return {"messages": [*row["prompt"], *row["completion"]]} if "completion" in row else row


def with_thoughts_in_content(row: dict[str, Any]) -> dict[str, Any]:
    """Write `reasoning_content` into the content, where a tool has no key for thoughts.

    Sources: https://github.com/hiyouga/LlamaFactory/issues/8112,
    https://swift.readthedocs.io/en/latest/BestPractices/Qwen3-Best-Practice.html
    """
    for turn in row.get("messages", ()):
        if thought := turn.pop("reasoning_content", None):
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
    return row


def as_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """Write calls as turns of the role `function_call`, tools as JSON text, an answer of a pair as one message."""
    row = with_thoughts_in_content(as_messages(row))
    for turn in row.get("messages", ()):
        if calls := turn.pop("tool_calls", None):
            functions = [call["function"] for call in calls]
            turn |= {"role": "function_call", "content": json.dumps(functions[0] if len(calls) == 1 else functions)}
    if "messages" in row:
        row["tools"] = json.dumps(row["tools"]) if row.get("tools") else ""
    return one_answer(row)


def as_parts(row: dict[str, Any]) -> dict[str, Any]:
    """Write each content as parts, with a part for each `<image>`."""
    for turn in row["messages"]:
        pieces = re.split("(<image>)", turn["content"])
        parts = ({"type": "image"} if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces)
        turn["content"] = [part for part in parts if part.get("text") != ""]
    return row


def one_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Write each answer of a pair as a message instead of a list of one."""
    row = as_messages(row)
    return row | {side: row[side][-1] for side in ("chosen", "rejected") if isinstance(row.get(side), list)}


def with_last_marked(row: dict[str, Any]) -> dict[str, Any]:
    """Mark each message, so that only the last is trained on."""
    row = as_messages(row)
    messages = [turn | {"train": turn is row["messages"][-1]} for turn in row["messages"]]
    return row | {"messages": messages}


def as_two_conversations(row: dict[str, Any]) -> dict[str, Any]:
    """Write a pair as two full conversations, `messages` and `rejected_messages`."""
    if not isinstance(row.get("rejected"), list):
        return with_thoughts_in_content(as_messages(row))
    return {"messages": [*row["prompt"], *row["chosen"]], "rejected_messages": [*row["prompt"], *row["rejected"]]}


def as_numbered(row: dict[str, Any]) -> dict[str, Any]:
    """Write a text with the name of its label as a message with the label's number."""
    number = ["animal", "colour"].index(row["label"])
    return {"messages": [{"role": "user", "content": row["text"]}], "label": number}
