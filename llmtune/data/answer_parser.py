"""What a model wrote behind its prompt, read into thoughts, calls of tools and text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import cast

from transformers.utils.chat_parsing import ResponseParser

from llmtune.data.chat_rows import ToolCall
from llmtune.data.chat_template import ChatTemplate, Tools
from llmtune.data.tokenization import decode


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer in its parts."""

    text: str
    """What is said, without blanks around it."""
    reasoning: str | None = None
    """The thoughts before it; None where there are none, or empty ones."""
    tool_calls: tuple[ToolCall, ...] = ()
    complete: bool = True
    """Whether it came to its end, and was not cut off."""
    error: str | None = None
    """Why a call in it cannot be read. The text holds all that was written then."""


def parse_answer(
    generated: Sequence[int] | str, template: ChatTemplate, tools: Tools = None, prompt: str | None = None
) -> ParsedAnswer:
    """Read what was generated behind the generation prompt, special tokens kept.

    What the generation prompt supplies, such as `<think>`, is taken into account and is no part of the result. It is
    looked for in `prompt`, where that is given: after a result of a tool some templates supply nothing. Calls are read
    only if `tools` are offered, since any text may look like a call. Arguments that are written without types get
    those of their declaration.
    """
    stray: Collection[str] = ()
    if isinstance(generated, str):
        text, complete = template.cut_end(generated)
    else:
        ends = template.end_ids
        ids = list(takewhile(lambda token: token not in ends, generated))
        text, complete = decode(template.processor, ids), len(ids) < len(generated)
        added = template.processor.added_tokens_decoder
        stray = {added[token].content for token in ids if token in added and added[token].special}
    parser = response_parser(template, tools, prompt)
    try:
        parser.feed(text)
        message, _ = parser.finalize()
        calls = tuple(canonical_call(call) for call in message.get("tool_calls") or ())
    except (ValueError, KeyError, TypeError) as error:
        return ParsedAnswer(_without(stray, text), complete=complete, error=str(error).splitlines()[0])
    reasoning = message.get("reasoning_content") or message.get("thinking")
    return ParsedAnswer(_without(stray, str(message.get("content") or "")), reasoning or None, calls, complete)


def _without(stray: Collection[str], text: str) -> str:
    """Take out special tokens that mark no part of an answer, as a model that has not learned the template writes."""
    for token in stray:
        text = text.replace(token, "")
    return text.strip()


def response_parser(template: ChatTemplate, tools: Tools = None, prompt: str | None = None) -> ResponseParser:
    """Return transformers' parser for one answer as it comes: feed it pieces of text, and it returns events.

    Its fields are `content`, `reasoning_content` and, if `tools` are offered, `tool_calls`; a tokenizer's own response
    template may name the thoughts `thinking`.
    """
    supplied = template.facts.supplied if prompt is None or prompt.endswith(template.facts.supplied) else ""
    if not tools:
        return ResponseParser(template.response_template(calls=False), prefix=supplied)
    return ResponseParser(template.response_template(calls=True), prefix=supplied, tools=list(tools))


def canonical_call(call: Mapping[str, object]) -> ToolCall:
    """Return a call as rows have it. Raises ValueError for one without a name, or whose arguments are no object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a call without a name: {call}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {function['name']!r} are no object: {arguments!r}")
    return cast(ToolCall, {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
