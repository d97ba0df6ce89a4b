"""The thoughts of an answer, in all ways in which rows have them: a field, a part, `<think>`, Harmony's channels."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmtune.data.rejected_rows import RowError, describe

REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
"""What a message calls its thoughts, in data sets and programming interfaces."""
THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"
"""How thoughts are written where a template does not show another way: as DeepSeek and Qwen do."""

_THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_CHANNEL = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>(analysis|commentary|final)<\|message\|>(.*?)"
    r"(?:<\|end\|>|<\|return\|>|(?=<\|start\|>|<\|channel\|>)|\s*\Z)",
    re.DOTALL,
)


def split_reasoning(turn: Mapping[str, object], content: str, parts: str, where: str) -> tuple[str | None, str]:
    """Return the thoughts of an answer and its text without them.

    Args:
        turn: The message as the row has it.
        content: Its text.
        parts: The thoughts that stood as parts of its content.
        where: Which message it is, for the problem.

    Raises:
        RowError: Thoughts are no text, or stand there twice and differ.
    """
    stated = [text.strip() for key in REASONING_KEYS if (text := _text(turn.get(key), f"{where}: {key!r}"))]
    stated += [parts.strip()] if parts.strip() else []
    inline, rest = _split_content(content)
    found = list(dict.fromkeys([*stated, *([inline] if inline else [])]))
    if len(found) > 1:
        raise RowError("thoughts twice", f"{where} has two that differ: {found[0][:40]!r} and {found[1][:40]!r}")
    return (found[0] if found else inline), rest


def _text(value: object, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("wrong type", f"{what} is {describe(value)}; it must be text")
    return value


def _split_content(content: str) -> tuple[str | None, str]:
    """Take thoughts off the start of a text; an empty block of them is an empty text."""
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
    said = "\n\n".join([*texts["commentary"], *texts["final"]])
    return "\n\n".join(texts["analysis"]) or None, said
