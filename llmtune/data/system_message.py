"""The system message that a chat template adds where a conversation has none: found out, or set by the recipe."""

from __future__ import annotations

import json

from llmtune.data.chat_rows import Message
from llmtune.data.chat_template import ChatTemplate

QUESTION: Message = {"role": "user", "content": "probe of a question"}
SYSTEM = "probe of a system message"


def with_system_prompt(template: str, prompt: str) -> str:
    """Return a chat template that puts `prompt` in front of conversations without a system message.

    It stands in the template itself, so that every program that reads it does the same.
    """
    message = f'[{{"role": "system", "content": {json.dumps(prompt, ensure_ascii=False)}}}]'
    condition = "{%- if not messages or messages[0]['role'] != 'system' -%}"
    return f"{condition}{{%- set messages = {message} + messages -%}}{{%- endif -%}}{template}"


def added_system_message(template: ChatTemplate) -> str | None:
    """Return the system message that a template adds to a question alone; None where it adds none."""
    alone = template.write([QUESTION])
    framed = template.write([{"role": "system", "content": SYSTEM}, QUESTION])
    if alone is None or framed is None or SYSTEM not in framed:
        return None
    before, _, after = (part.partition(QUESTION["content"])[0] for part in framed.partition(SYSTEM))
    head = alone.partition(QUESTION["content"])[0]
    if not (head.startswith(before) and head.endswith(after) and len(head) >= len(before + after)):
        return None
    return head[len(before) : len(head) - len(after)].strip() or None
