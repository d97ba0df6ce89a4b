"""What a chat template reads of what it is given, held against `model.chat_template_kwargs`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtune.errors import Problem, RecipeError, nearest

GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
"""What every template is given, whatever the recipe says."""
REMOVE = "Remove it; null takes back what an extended or shipped recipe sets: `model.chat_template_kwargs: null`."
_GENERATION_TAGS = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""Tags of transformers' own, which other readers of Jinja do not know."""


def template_variables(template: str) -> set[str]:
    """Return the names that a chat template reads of what it is given beside messages and tools."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION_TAGS.sub("", template))
    except jinja2.TemplateSyntaxError:
        return set()
    return meta.find_undeclared_variables(parsed) - GIVEN


def refuse_unread(kwargs: Mapping[str, object], template: str | Mapping[str, str]) -> None:
    """Raise RecipeError for names that the template (one of them, where there are several) never reads.

    A misspelt switch would do nothing, and nobody would know.
    """
    if not kwargs:
        return
    texts = [template] if isinstance(template, str) else template.values()
    read = sorted(set().union(*map(template_variables, texts)))
    RecipeError.collect(
        Problem(
            f"the chat template never reads {name!r}",
            f"model.chat_template_kwargs.{name}",
            f"{nearest(name, read)} It reads: {', '.join(read) or 'nothing of the kind'}. {REMOVE}".strip(),
        )
        for name in kwargs
        if name not in read
    )
