"""The text of a chat template: which variables it reads, and edits that a recipe makes to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import lru_cache
from typing import TypeVar

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtune.errors import EnvironmentProblem, Problem, RecipeError, nearest
from llmtune.recipe.secrets import REMOVED, hide

T = TypeVar("T")
GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Variables that every template gets, whatever the recipe says."""
REMOVE = "Remove it. To unset a value of an extended or shipped recipe, set `model.chat_template_kwargs: null`."
_GENERATION_TAGS = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""transformers' own tags, which other Jinja implementations do not know."""


TEMPLATE_BYTES = 2**17
"""The longest templates of known models are a quarter of it."""
ENDLESS = "Set model.chat_template to a Jinja file that renders a conversation in a moment."
"""Fix for a template that takes too long."""
FIXED_DATE = datetime(2024, 7, 26)
"""Replaces today's date in templates, so a run can be repeated; the date is from Llama 3.1's template."""
_DATE_CALL = re.compile(r"strftime_now\s*\(\s*(['\"])(.{0,200}?)\1\s*\)")


def check_length(template: str, name: str) -> None:
    """Raise EnvironmentProblem for a template that takes too long to parse."""
    if len(template) > TEMPLATE_BYTES:
        what = f"the chat template has {len(template):,} characters, but at most {TEMPLATE_BYTES:,} are allowed"
        raise EnvironmentProblem.of(what, name, ENDLESS)


def template_variables(template: str) -> set[str]:
    """Return the variables that a chat template reads, except messages and tools."""
    return _find(template, meta.find_undeclared_variables) - GIVEN


@lru_cache(maxsize=16)  # asked for every prompt
def reads_date(template: str) -> bool:
    """Whether a template uses today's date, under its own name or another; it may ask whether there is one."""
    return _find(template, _reads_date)


def _reads_date(parsed: nodes.Template) -> bool:
    tested_nodes = {id(test.node) for test in parsed.find_all(nodes.Test) if test.name == "defined"}
    names = (
        name for name in parsed.find_all(nodes.Name) if name.name == "strftime_now" and id(name) not in tested_nodes
    )
    return any(names)


def _find(template: str, find: Callable[[nodes.Template], T]) -> T:
    """Return what `find` finds in the syntax tree of a template.

    The tree is empty if the template is invalid or nested too deeply, which its first rendering reports.
    """
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return find(environment.parse(_GENERATION_TAGS.sub("", template)))
    except (jinja2.TemplateSyntaxError, RecursionError):
        return find(environment.parse(""))


def with_defaults(template: str, kwargs: Mapping[str, object]) -> str:
    """Return the template with `kwargs` as the defaults of its variables.

    Every program that reads the template then renders as in training, without extra parameters. A value that a client
    sends overrides the default.
    """
    head = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in without_secrets(kwargs).items()
    )
    return template if template.startswith(head) else head + template


def with_system_prompt(template: str, prompt: str) -> str:
    """Return a chat template that puts `prompt` in front of conversations without a system message.

    It is part of the template, so every program that reads it behaves the same.
    """
    message = f'[{{"role": "system", "content": {json.dumps(prompt, ensure_ascii=False)}}}]'
    condition = "{%- if not messages or messages[0]['role'] != 'system' -%}"
    return f"{condition}{{%- set messages = {message} + messages -%}}{{%- endif -%}}{template}"


def with_parts(template: str) -> str:
    """Return a chat template that also takes texts as contents, for one that takes only lists of parts."""
    message = "{'role': message['role'], 'content': [{'type': 'text', 'text': message['content']}]}"
    return (
        "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}{%- if message['content'] is string -%}"
        f"{{%- set ns.messages = ns.messages + [{message}] -%}}"
        "{%- else -%}{%- set ns.messages = ns.messages + [message] -%}{%- endif -%}{%- endfor -%}"
        f"{{%- set messages = ns.messages -%}}{template}"
    )


def without_secrets(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the values that may be stored in a template, which others can read once it is published."""
    return {name: value for name, value in kwargs.items() if REMOVED not in str(hide(name, value))}


def _literal(value: object) -> str:
    """Write a value as a Jinja literal."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value if isinstance(value, str | int | float) else str(value), ensure_ascii=False)


def refuse_unread(kwargs: Mapping[str, object], template: str | Mapping[str, str], taken: Collection[str] = ()) -> None:
    """Raise RecipeError for names that the template (or any of several) never reads.

    A misspelt switch would silently do nothing. Names in `taken` already have a value, so a default would do nothing
    either.
    """
    if not kwargs:
        return
    texts = [template] if isinstance(template, str) else template.values()
    read = sorted(set().union(*map(template_variables, texts)) - {*taken})
    RecipeError.collect(
        Problem(
            f"the chat template never reads {name!r}",
            f"model.chat_template_kwargs.{name}",
            f"{nearest(name, read)} It reads: {', '.join(read) or 'no variables'}. {REMOVE}".strip(),
        )
        for name in kwargs
        if name not in read
    )


def fix_date(template: str) -> str:
    """Replace calls for today's date in a template by `FIXED_DATE`.

    The date becomes part of the saved template, and is the same every day and in every program.
    """
    return _DATE_CALL.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), template)
