"""Keys without effect that only the model or the rows show: those of a style, a loss or a chat template not used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmtune.errors import Problem
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import RecipeSection
from llmtune.recipe.task_facts import TEMPLATE_KEYS
from llmtune.recipe.task_sections import EMBED_KEYS, QA_KEYS


def find_idle_keys(recipe: Recipe, *, style: str | None, reads_template: bool) -> Iterator[Problem]:
    """Yield the keys of a resolved recipe that have no effect on its kind of model and of rows.

    `style` is that of a qa model, and `reads_template` is whether the model's prompts are made by a chat template.
    """
    if recipe.qa is not None and style is not None:
        others = (name for other, names in QA_KEYS.items() if other != style for name in names)
        fix = f"Remove it, and set qa.style: {style}."
        yield from _problems("qa", recipe.qa, others, f"the model's style is {style}", fix)
    if recipe.embed is not None:
        others = (name for name, losses in EMBED_KEYS.items() if recipe.embed.loss not in losses)
        yield from _problems("embed", recipe.embed, others, f"the loss of these rows is {recipe.embed.loss}")
    if not reads_template and recipe.variant.facts.templated:
        for name, section in (("data", recipe.data), ("model", recipe.model)):
            yield from _problems(name, section, TEMPLATE_KEYS[name], "this kind of model reads no chat template")
    if style == "extractive":
        generation = recipe.generation
        yield from _problems("generation", generation, type(generation).model_fields, "the model marks answers")


def _problems(
    name: str, section: RecipeSection, keys: Iterable[str], why: str, fix: str = "Remove it."
) -> Iterator[Problem]:
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield Problem(f"'{name}.{key}' has no effect: {why}", f"{name}.{key}", fix)
