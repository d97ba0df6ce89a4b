"""The evaluation suites that a recipe names, and whether they can run: checked before anything heavy is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.benchmarks import BenchmarkSuite
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.fairness import FairnessSuite, check_fairness, check_likelihoods
from llmtune.evaluate.forgetting import ForgettingSuite, check_forgetting
from llmtune.evaluate.lm_eval import check_benchmarks
from llmtune.evaluate.suite import EvalSuite

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

SUITES: dict[str, type[EvalSuite]] = {
    "forgetting": ForgettingSuite,
    "fairness": FairnessSuite,
    "benchmarks": BenchmarkSuite,
}
"""By key of `evaluate`."""
DECODER = "AutoModelForCausalLM"
OF_DECODERS = {
    "forgetting": "the likelihood of general text and of answers to general questions",
    "benchmarks": "the likelihood of answers, or answers that are written behind a prompt",
}
"""Suites that only a decoder language model can run, and what they take of it."""


def make_suites(context: EvalContext) -> tuple[EvalSuite, ...]:
    """Return the suites that the recipe names, their own inputs read and checked before a model is loaded.

    Raises DataError for inputs that cannot be read or used.
    """
    return tuple(suite(context) for name, suite in SUITES.items() if getattr(context.recipe.evaluate, name))


def check_inputs(recipe: Recipe) -> None:
    """Read what suites read besides the rows, at the beginning of a run: a missing file shows before training.

    Raises DataError for inputs that cannot be read or used.
    """
    check_forgetting(recipe)
    check_fairness(recipe)
    check_benchmarks(recipe)


def check_variant(recipe: Recipe, task: EvaluatedTask, model: str) -> None:
    """Refuse suites that this variant of the task cannot run; known once the model's configuration is.

    Raises RecipeError.
    """
    check_likelihoods(recipe, task, model)
    if task.auto_class == DECODER:
        return
    RecipeError.collect(
        Problem(
            f"{model} is no decoder language model, and this suite takes {taken}",
            f"evaluate.{name}",
            f"Remove evaluate.{name}, or set model.name to a decoder, such as a Llama or a Qwen.",
        )
        for name, taken in OF_DECODERS.items()
        if getattr(recipe.evaluate, name)
    )
