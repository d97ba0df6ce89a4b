"""Parses generated text into thoughts, tool calls and text; the turns of a row with tools."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, cast

from llmtune.data.answer_format import NO_CALLS, make_response_template
from llmtune.data.chat_rows import Tool, ToolCall, answer_message
from llmtune.records import Json, Row

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser

    from llmtune.data.chat_template import ChatTemplate, Tools

THOUGHT_FIELDS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class ParsedAnswer:
    """The parts of an answer."""

    text: str
    """The text, stripped of surrounding white space."""
    reasoning: str | None = None
    """The thoughts before the text; empty if their marks have none between them, None without marks."""
    tool_calls: tuple[ToolCall, ...] = ()
    complete: bool = True
    """Whether the answer ended; False if it was truncated."""
    error: str | None = None
    """Why a call cannot be parsed. In that case `text` has the complete text."""
    sampled: str = field(default="", compare=False)
    """The text as it was sampled: with thoughts, marks and white space, without special tokens. Rewards read it."""


def parse_answer(
    generated: Sequence[int] | str, template: ChatTemplate, tools: Tools = None, prompt: str | None = None
) -> ParsedAnswer:
    """Parse the text after the generation prompt, special tokens included.

    The result excludes text supplied by the generation prompt, such as `<think>`. If `prompt` is given, the supplied
    text is searched there: some templates supply nothing after a tool result. Calls are parsed only if `tools` are
    offered, because any text may look like a call. Arguments written without types get the types of their declaration.
    """
    from llmtune.data.tokenization import decode  # late: imports transformers

    stray: Collection[str] = ()
    if isinstance(generated, str):
        ends = [template.facts.end, template.facts.calls.end, template.processor.eos_token]
        at = min((generated.index(end) for end in ends if end and end in generated), default=None)
        sampled = text = generated[:at]
        complete = at is not None
    else:
        end_ids = template.end_ids
        ids = list(takewhile(lambda token: token not in end_ids, generated))
        text, sampled = decode(template.processor, ids), decode(template.processor, ids, skips_special=True)
        complete = len(ids) < len(generated)
        added = template.processor.added_tokens_decoder
        stray = {added[token].content for token in ids if token in added and added[token].special}
    parser = response_parser(template, tools, prompt)
    try:
        events = parser.feed(text)
        message, last_events = parser.finalize()
        calls = tuple(canonical_call(call) for call in message.get("tool_calls") or ())
    except (ValueError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0]
        return ParsedAnswer(_remove_tokens(stray, text), complete=complete, error=why, sampled=sampled)
    has_marks = any(event["field"] in THOUGHT_FIELDS for event in (*events, *last_events))
    thoughts = next((str(message[field]) for field in THOUGHT_FIELDS if field in message), "" if has_marks else None)
    reasoning = thoughts and _remove_tokens(stray, thoughts)
    content = _remove_tokens(stray, str(message.get("content") or ""))
    return ParsedAnswer(content, reasoning, calls, complete, sampled=sampled)


def read_written(text: str, calls: Sequence[ToolCall] = ()) -> ParsedAnswer:
    """Return the parts of an answer that no template wrote: thoughts are in `<think>` as in rows, calls are apart."""
    message = answer_message(text)
    return ParsedAnswer(message["content"].strip(), message.get("reasoning") or None, tuple(calls), sampled=text)


def _remove_tokens(stray: Collection[str], text: str) -> str:
    """Remove special tokens that mark no part of an answer. Models that have not learned the template write them."""
    for token in stray:
        text = text.replace(token, "")
    return text.strip()


def response_parser(template: ChatTemplate, tools: Tools = None, prompt: str | None = None) -> ResponseParser:
    """Return transformers' parser for one streamed answer: it takes pieces of text and returns events.

    The fields are `content`, `reasoning_content` and, if `tools` are offered, `tool_calls`. A tokenizer's own response
    template may name the thoughts `thinking`.
    """
    from transformers.utils.chat_parsing import ResponseParser  # late: takes seconds

    supplied = template.facts.supplied if prompt is None or prompt.endswith(template.facts.supplied) else ""
    form = response_template(template, calls=bool(tools))
    return ResponseParser(form, prefix=supplied, tools=list(tools) if tools else None)


def response_template(template: ChatTemplate, calls: bool) -> Json:
    """Return the response template for `ResponseParser`: the tokenizer's, or one made from the facts.

    Without `calls`, a tool call is parsed as text.
    """
    tokenizer_template: Json | None = getattr(template.processor, "response_template", None)
    if tokenizer_template is None:
        facts = template.facts
        ending = facts.tail.partition(facts.end)[0]
        return make_response_template(facts.thoughts, facts.calls if calls else NO_CALLS, facts.heading, ending)
    fields = tokenizer_template["fields"].items()
    return {**tokenizer_template, "fields": {name: field for name, field in fields if calls or name != "tool_calls"}}


def canonical_call(call: Mapping[str, object]) -> ToolCall:
    """Return a call in the format of rows. Raises ValueError if it has no name or its arguments are no object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a call without a name: {call}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {function['name']!r} are not an object: {arguments!r}")
    json.dumps(arguments, allow_nan=False)  # Python's reader takes NaN and 1e999, which no other reader of JSON does
    return cast(ToolCall, {"type": "function", "function": {"name": function["name"], "arguments": arguments}})


@dataclass(frozen=True)
class ToolTurn:
    """One answer of a row with tools: the turns before it, and the calls of the reference."""

    question: Row
    """The row before it, with its tools."""
    calls: Sequence[ToolCall]

    @property
    def tools(self) -> Sequence[Tool]:
        """Tools that may be called."""
        tools: Sequence[Tool] = self.question["tools"]
        return tools
