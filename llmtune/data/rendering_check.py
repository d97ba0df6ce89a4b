"""Checks that all contents of rows appear in their renderings, and that answers are where the template marks them.

`TemplateFacts` shows the parts that a template always omits: system message, calls, results, tool declarations. A
search for the texts in the rendering finds contents that it cuts or changes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_format import CALLS, RESULTS, TOOL, TOOL_PARTS, TOOLS
from llmtune.data.chat_messages import list_pictures, unmark
from llmtune.data.chat_rows import Message, Tool
from llmtune.data.chat_template import (
    ChatTemplate,
    PreparedChat,
    Tools,
    inline_thoughts,
    read_template,
    with_kwargs,
)
from llmtune.data.example import Example
from llmtune.data.pictures import PLACE
from llmtune.data.row_store import iterate_texts
from llmtune.data.template_facts import TemplateFacts
from llmtune.data.template_text import template_variables
from llmtune.data.tokenization import decode
from llmtune.errors import EnvironmentProblem
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Row, Rows

KEYS = ('"tools":', '"tool_calls":', '"role":"tool"')
"""As stored in rows. Inside a text, quotes are escaped with backslashes."""
OTHER = "Set model.chat_template to a Jinja file that writes `tools`, `tool_calls` and messages of the role `tool`"
SHOWN = 40
"""How many characters of a text a reason quotes."""
FEW_TOKENS = 4
"""Longer answers contain a character that the tokenizer knows."""
CHATML = "<|im_start|>"
"""A model whose own template writes this can learn tools with the template that comes with llmtune."""
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
Expected = tuple[str, str, bool]
"""A text that must appear, its name in messages, and whether the template writes such texts at all."""


def find_missing(
    facts: TemplateFacts, messages: Sequence[Message], tools: Tools, text: str, thoughts: Collection[int]
) -> str | None:
    """Return the part of a conversation that its rendering lacks, or None if it is complete.

    Args:
        facts: The template's facts.
        messages: The rendered messages, in the templates' form.
        tools: The tool declarations, if any.
        text: The rendering.
        thoughts: The answers whose thoughts must appear; the template may omit the others.
    """
    text = unmark(text)
    parts = [*_message_parts(facts, messages, thoughts), *_tool_parts(facts, tools)]
    if (lost := next((name for _, name, written in parts if not written), None)) is not None:
        return f"the chat template leaves out {lost}"
    at = 0
    for part, name, _ in parts:
        part = unmark(part)
        start = text.find(part, at)  # most follow the previous one
        if start >= 0:
            at = start + len(part)
        elif not (part in text or all(any(form in text for form in _forms(line)) for line in part.splitlines())):
            return f"the chat template leaves out or changes {name}"
    texts = [unmark(text) for message in messages for text in _texts_of(message)]
    for part in dict.fromkeys(filter(None, texts)):
        wanted = sum(one.count(part) for one in texts)
        if wanted <= text.count(part):
            continue
        written = sum(text.count(form) for form in {*_forms(part)}) if wanted > 1 else 0
        if 0 < written < wanted:  # the match may be another message, or a part of one
            return f"the chat template leaves out one of {wanted} messages that say {part[:SHOWN]!r}"
    return None


def _forms(line: str) -> Iterator[str]:
    """Yield the forms in which templates write a line of text: unchanged, and escaped in JSON."""
    yield line.strip()
    yield json.dumps(line.strip(), ensure_ascii=False)[1:-1]
    yield json.dumps(line.strip())[1:-1]


def _message_parts(facts: TemplateFacts, messages: Sequence[Message], thoughts: Collection[int]) -> Iterator[Expected]:
    writes = facts.calls.writes
    for i, message in enumerate(messages):
        where = f"message {i + 1} ({message['role']})"
        for text in filter(None, _texts_of(message)):
            is_system = message["role"] == "system"
            written = facts.writes_system if is_system else message["role"] != "tool" or RESULTS in writes
            yield text, "the system message" if is_system else f"the text of {where}", written
        if i in thoughts and (reasoning := message.get("reasoning_content")):
            yield reasoning.strip(), f"the thoughts of {where}", True
        for call in message.get("tool_calls") or ():
            function = call["function"]
            what = f"the call of {function['name']!r}" if CALLS in writes else "the tool call"
            yield function["name"], f"{what} in {where}", CALLS in writes
            arguments: object = function["arguments"]  # some templates get JSON text
            for text in _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments):
                yield text, f"the arguments of {what} in {where}", True


def _texts_of(message: Message) -> list[str]:
    """Return the texts of a message, which pictures separate."""
    content = message["content"]
    return [text.strip() for text in (content.split(PLACE) if "images" in message else [content])]


def _leaves(value: object) -> Iterator[str]:
    """Yield keys and values of arguments. Booleans and null have too many spellings to search for."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _tool_parts(facts: TemplateFacts, tools: Tools) -> Iterator[Expected]:
    """Yield the name, description and parameters of each tool."""
    for tool in tools or ():
        function = tool["function"]
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        texts = [str(function.get(key) or "").strip() for key in ("name", "description")]
        written = TOOLS in facts.calls.writes
        name = f"the tool {function.get('name')!r}" if written else "the tools that may be called"
        for text in [*filter(None, texts), *(properties if isinstance(properties, dict) else ())]:
            yield text, name, written


@lru_cache
def _marks_answers(source: str) -> bool:
    """Whether a template has `{% generation %}` marks."""
    return _GENERATION.search(source) is not None


def check_marks(example: Example, chat: PreparedChat, messages: int, template: ChatTemplate) -> str | None:
    """Compare the spans of the first `messages` of a conversation with the template's own `{% generation %}` marks.

    Marks may omit whatever is not the answer's text: a header, line breaks, the end-of-turn token. An example with
    thoughts that the template leaves out is not the template's rendering, and has no marks.
    """
    processor = template.processor
    plain = processor.is_fast and not chat.marked and not list_pictures(chat.messages[:messages])
    if not plain or not _marks_answers(template.text(chat.tools)):
        return None
    rendered = processor.apply_chat_template(
        list(inline_thoughts(template, chat.messages[:messages])),
        tools=chat.tools,
        chat_template=template.text(chat.tools),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **template.kwargs,
    )
    marks, ids = rendered["assistant_masks"], list(example.input_ids)
    if rendered["input_ids"][: len(ids)] != ids:
        return None
    for start, end in zip(example.spans[::2], example.spans[1::2], strict=True):
        inside = [i for i in range(start, end) if marks[i]]
        left = [*ids[start : inside[0]], *ids[inside[-1] + 1 : end]] if inside else []
        before = start
        while before and marks[before - 1] and not chat.keeps_reasoning:  # else the answer's thoughts are before it
            before -= 1
        text = decode(processor, [*left, *ids[before:start]])
        for token in (*template.facts.special, template.facts.thoughts.opener.strip()):
            text = text.replace(token, "")
        if text.strip() or not inside or len(inside) != inside[-1] + 1 - inside[0]:
            return "the chat template's {% generation %} marks are not where its answers are"
    return None


def find_dropped(template: ChatTemplate, ids: Sequence[int], answer: str) -> str | None:
    """Return why an answer cannot be learned if its ids are only those of its end; None if they are more."""
    if len(ids) > FEW_TOKENS:
        return None
    written = decode(template.processor, ids)
    for token in template.facts.special:
        answer, written = answer.replace(token, ""), written.replace(token, "")
    return "the tokenizer drops every character of an answer" if answer.strip() and not written.strip() else None


# Checks before any row is encoded


def check_tools(rows: Rows, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Refuse a chat template that omits tool contents of the rows. Raises as `refuse_lost_tools` does."""
    texts = (text for split in rows.files for _, text in iterate_texts(rows, split))
    refuse_lost_tools(texts, rows.rows_in, processor, recipe)


def refuse_lost_tools(texts: Iterable[str], rows_in: int, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Refuse a chat template that omits tool contents of rows, in JSON; the error names a fix.

    If no more rows are affected than `data.max_dropped` allows, they are left out one by one instead.

    Raises:
        EnvironmentProblem: the template omits declarations of tools, calls or results.
    """
    if not TASK_FACTS[recipe.task].has_messages or not processor.chat_template:
        return
    used = Counter(_used_parts(json.loads(text)) for text in texts if any(key in text for key in KEYS))
    del used[()]
    if used.total() <= recipe.data.max_dropped * rows_in:
        return
    template = read_template(processor, recipe)
    written = template.facts.calls.writes
    lost = {parts: count for parts, count in used.items() if not written.issuperset(parts)}
    count = sum(lost.values())
    if count <= recipe.data.max_dropped * rows_in:
        return
    left_out = [part for part in dict.fromkeys(part for parts in lost for part in parts) if part not in written]
    what = f"the chat template leaves out {', '.join(left_out)}, which {count:,} of {rows_in:,} rows have"
    switch = _find_switch(template, {part for parts in used for part in parts})
    other = " (`builtin:chatml` is one)" if CHATML in template.text() else ""
    fix = f"Set model.chat_template_kwargs: {switch}." if switch else f"{OTHER}{other}, or a model whose template does."
    raise EnvironmentProblem.of(what, template.name, fix)


def _used_parts(row: Row) -> tuple[str, ...]:
    """Return the tool parts that a row has."""
    messages = row.get("messages", ())
    has = (
        row.get("tools"),
        any(message.get("tool_calls") for message in messages),
        any(message["role"] == "tool" for message in messages),
    )
    return tuple(part for part, there in zip(TOOL_PARTS, has, strict=True) if there)


def _find_switch(template: ChatTemplate, used: Collection[str]) -> str | None:
    """Return a switch, as a recipe has it, with which the template writes every used part."""
    for name in sorted(template_variables(template.text([cast(Tool, TOOL)]))):
        for value in (True, False):
            with suppress(EnvironmentProblem):
                switched = with_kwargs(template, {**template.kwargs, name: value})
                if switched.facts.calls.writes.issuperset(used):
                    return f"{{{name}: {str(value).lower()}}}"
    return None
