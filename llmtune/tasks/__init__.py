"""The table of tasks: each is a `Task` put together, in a file of its own, from functions of the packages below.

A task has a form for each kind of model that can do it: an encoder points at an answer, a decoder writes it.
"""

from __future__ import annotations

from typing import Any

from llmtune.errors import RecipeError, nearest
from llmtune.model.config import NEEDS, describe_config, fits
from llmtune.recipe import Recipe
from llmtune.records import Task
from llmtune.tasks import (
    chat,
    classify,
    completion,
    preference,
    qa,
    speech,
    summarize,
    token_classify,
    translate,
)

__all__ = ["FORMS", "TASKS", "choose_form", "get_task"]

_FILES = (chat, completion, translate, summarize, qa, classify, token_classify, speech, preference)
FORMS: dict[str, tuple[Task, ...]] = {file.FORMS[0].name: file.FORMS for file in _FILES}
"""By task, its forms; the first that the recipe admits and the model fits is taken."""
TASKS: dict[str, Task] = {name: forms[0] for name, forms in FORMS.items()}


def get_task(name: str) -> Task:
    """Return the task called `name`, in its first form.

    Raises:
        RecipeError: there is none.
    """
    if name not in TASKS:
        known = tuple(TASKS)
        raise RecipeError.of(
            f"unknown task {name!r}.{nearest(name, known)}", where="task", fix=f"Choose one of: {', '.join(known)}."
        )
    return TASKS[name]


def choose_form(recipe: Recipe, config: Any, model: str) -> Task:
    """Return the form of the recipe's task that a model with this configuration can do.

    Raises:
        RecipeError: there is none; it says what the task needs.
    """
    get_task(recipe.task)
    forms = [form for form in FORMS[recipe.task] if form.admits(recipe)]
    own = getattr(config, "auto_map", None) or {}
    for form in forms:
        if fits(config, form) or (recipe.model.trust_remote_code and form.auto_class in own):
            return form
    wanted = " or ".join(dict.fromkeys(form.auto_class for form in forms))
    raise RecipeError.of(
        f"{model} is a {describe_config(config)}: it cannot be used for the task {recipe.task}, which needs {wanted}",
        "model.name",
        " Or: ".join(dict.fromkeys(NEEDS[form.auto_class] for form in forms)),
    )
