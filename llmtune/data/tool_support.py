"""Whether a chat template writes the tools, calls and results that rows have: asked before any row is encoded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import cast

from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_format import TOOL, TOOL_PARTS
from llmtune.data.chat_rows import Tool
from llmtune.data.chat_template import ChatTemplate, read_template, with_kwargs
from llmtune.data.row_store import iterate_texts
from llmtune.data.template_kwargs import template_variables
from llmtune.errors import EnvironmentProblem
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Row, Rows

KEYS = ('"tools":', '"tool_calls":', '"role":"tool"')
"""As rows have them on disk. Within a text, quotes have backslashes before them."""
OTHER = "Set model.chat_template to a Jinja file that writes `tools`, `tool_calls` and messages of the role `tool`"
CHATML = "<|im_start|>"
"""A model whose own template writes it can learn tools by the template that comes with llmtune."""


def check_tools(rows: Rows, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Refuse a chat template that leaves out what rows have of tools, with what would mend it.

    Rows that it cannot write, no more than `data.max_dropped` allows, are left out one by one instead.

    Raises:
        EnvironmentProblem: it leaves out declarations of tools, calls or results.
    """
    if not TASK_FACTS[recipe.task].has_messages or not processor.chat_template:
        return
    texts = (text for split in rows.files for _, text in iterate_texts(rows, split))
    used = Counter(_parts(json.loads(text)) for text in texts if any(key in text for key in KEYS))
    del used[()]
    if used.total() <= recipe.data.max_dropped * rows.rows_in:
        return
    template = read_template(processor, recipe)
    written = template.facts.calls.writes
    lost = {parts: count for parts, count in used.items() if not written.issuperset(parts)}
    count = sum(lost.values())
    if count <= recipe.data.max_dropped * rows.rows_in:
        return
    left_out = [part for part in dict.fromkeys(part for parts in lost for part in parts) if part not in written]
    what = f"the chat template leaves out {', '.join(left_out)}, which {count:,} of {rows.rows_in:,} rows have"
    switch = _find_switch(template, {part for parts in used for part in parts})
    other = " (`builtin:chatml` is one)" if CHATML in template.text() else ""
    fix = f"Set model.chat_template_kwargs: {switch}." if switch else f"{OTHER}{other}, or a model whose template does."
    raise EnvironmentProblem.of(what, template.name, fix)


def _parts(row: Row) -> tuple[str, ...]:
    """Return what a row has of tools."""
    messages = row.get("messages", ())
    has = (
        row.get("tools"),
        any(message.get("tool_calls") for message in messages),
        any(message["role"] == "tool" for message in messages),
    )
    return tuple(part for part, there in zip(TOOL_PARTS, has, strict=True) if there)


def _find_switch(template: ChatTemplate, used: Collection[str]) -> str | None:
    """Return the switch of a template with which it writes all that is used, as a recipe has it."""
    for name in sorted(template_variables(template.text([cast(Tool, TOOL)]))):
        for value in (True, False):
            with suppress(EnvironmentProblem):
                switched = with_kwargs(template, {**template.kwargs, name: value})
                if switched.facts.calls.writes.issuperset(used):
                    return f"{{{name}: {str(value).lower()}}}"
    return None
