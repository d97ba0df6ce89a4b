"""The studies that a recipe asks for, and whether they can be made: told before anything heavy is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.fairness import check_fairness, check_speaks, make_fairness
from llmtune.evaluate.forgetting import check_forgetting, make_forgetting
from llmtune.evaluate.lm_eval_harness import check_benchmarks, make_benchmarks
from llmtune.evaluate.suite_runner import Inquiry, Setting

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

DECODER = "AutoModelForCausalLM"
OF_DECODERS = {
    "forgetting": "the likelihood of general text and of answers to general questions",
    "benchmarks": "the likelihood of answers, or answers that are written behind a prompt",
}
"""Studies that only a decoder language model can be asked, and what they take of it."""


def make_inquiries(setting: Setting) -> tuple[Inquiry, ...]:
    """Return the studies that the recipe asks for, their own inputs read and checked before a model is loaded.

    Raises DataError for inputs that cannot be read or used.
    """
    evaluate = setting.recipe.evaluate
    found: list[Inquiry] = []
    if evaluate.forgetting:
        found.append(make_forgetting(setting))
    if evaluate.fairness:
        found.append(make_fairness(setting))
    if evaluate.benchmarks:
        found.append(make_benchmarks(setting))
    return tuple(found)


def check_inputs(recipe: Recipe) -> None:
    """Read what studies read besides the rows, at the beginning of a run: a missing file is told before training.

    Raises DataError for inputs that cannot be read or used.
    """
    check_forgetting(recipe)
    check_fairness(recipe)
    check_benchmarks(recipe)


def check_variant(recipe: Recipe, task: EvaluatedTask, model: str) -> None:
    """Refuse studies that this variant of the task cannot be asked; known once the model's configuration is.

    Raises RecipeError.
    """
    check_speaks(recipe, task, model)
    if task.auto_class == DECODER:
        return
    RecipeError.collect(
        Problem(
            f"{model} is no decoder language model, and this study takes {taken}",
            f"evaluate.{name}",
            f"Remove evaluate.{name}, or set model.name to a decoder, such as a Llama or a Qwen.",
        )
        for name, taken in OF_DECODERS.items()
        if getattr(recipe.evaluate, name)
    )
