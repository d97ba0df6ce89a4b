"""The table of tasks. A task has a variant for each kind of model that can do it."""

from __future__ import annotations

from transformers import PretrainedConfig

from llmtune.model.config import explain_unsupported, supports_task
from llmtune.recipe.schema import Recipe
from llmtune.tasks import (
    chat,
    classify,
    completion,
    embed,
    image_chat,
    preference,
    qa,
    reinforce,
    rerank,
    speech,
    summarize,
    token_classify,
    translate,
)
from llmtune.tasks.base import AnyTask

_FILES = (
    *(chat, image_chat, completion, translate, summarize, qa, classify, token_classify, speech, preference, embed),
    *(reinforce, rerank),
)
_ALL = [variant for file in _FILES for variant in file.VARIANTS]
VARIANTS: dict[str, tuple[AnyTask, ...]] = {
    name: tuple(variant for variant in _ALL if variant.name == name) for name in dict.fromkeys(one.name for one in _ALL)
}
"""By task, its variants in order: the first that matches the recipe and supports the model is chosen."""


def get_task(name: str) -> AnyTask:
    """Return the first variant of a task."""
    return VARIANTS[name][0]


def choose_variant(recipe: Recipe, config: PretrainedConfig, model: str) -> AnyTask:
    """Return the variant of the recipe's task for a model with this configuration.

    Raises:
        RecipeError: no variant supports the model. The error lists the required kinds of models.
    """
    variants = [variant for variant in VARIANTS[recipe.task] if variant.matches(recipe)]
    auto_map = getattr(config, "auto_map", None) or {}
    for variant in variants:
        if supports_task(config, variant) or (
            recipe.model.trust_remote_code and variant.model_kind.auto_class in auto_map
        ):
            return variant
    raise explain_unsupported(model, config, recipe.task, [variant.model_kind for variant in variants])
