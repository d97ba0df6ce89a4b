"""The evaluation suites by recipe key, and whether they can run: checked before anything heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.decision import print_need
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.inference import Answers
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.suites.benchmarks import BenchmarkSuite
from llmtune.evaluate.suites.eval_suite import EvalSuite, join_studies
from llmtune.evaluate.suites.forgetting import ForgettingSuite
from llmtune.evaluate.suites.group_gaps import GroupGapSuite
from llmtune.evaluate.suites.judge import JudgeSuite
from llmtune.evaluate.suites.judge_client import Judge
from llmtune.evaluate.suites.label_errors import check_suspects
from llmtune.evaluate.suites.own_metrics import check_own_metrics, try_own_metrics
from llmtune.evaluate.suites.swapped_rows import SwapSuite
from llmtune.recipe.eval_suites_section import SUITE_KEYS
from llmtune.recipe.schema import Recipe
from llmtune.records import Rows
from llmtune.store.score_records import Study

Suite = EvalSuite[Any]
SUITES: dict[str, dict[str, type[Suite]]] = {
    "forgetting": {"": ForgettingSuite},
    "fairness": {"swaps": SwapSuite, "groups": GroupGapSuite},
    "benchmarks": {"": BenchmarkSuite},
    "judge": {"": JudgeSuite},
}
"""By key of `evaluate`, a suite's parts by the section key that requests them; a part without a key always runs."""


def stated_suites(recipe: Recipe) -> Iterator[tuple[str, type[Suite]]]:
    """Yield the suites that the recipe names, part by part, each with its key."""
    for name, parts in SUITES.items():
        section = getattr(recipe.evaluate, name)
        yield from ((name, part) for key, part in parts.items() if section and (not key or getattr(section, key)))


def make_suites(context: EvalContext) -> list[tuple[str, Suite]]:
    """Return the suites that the recipe names, with inputs read and checked before a model is loaded.

    Raises DataError for inputs that cannot be read or used.
    """
    suites = [(name, suite(context)) for name, suite in stated_suites(context.recipe)]
    for name, suite in suites:
        if suite.unmeasured:
            what = f"{name}.{next(iter(suite.metrics))}: {suite.unmeasured}"
            context.console.print(what, style="dim", highlight=False)
    return suites


def check_inputs(recipe: Recipe) -> None:
    """Read the suites' inputs and the user's own metrics when a run starts, to report missing files before training.

    Raises:
        DataError: inputs that cannot be read or used.
        EnvironmentProblem: the hub cannot be reached, or a package is missing.
        RecipeError: a metric of the user's own cannot be imported.
    """
    for _, suite in stated_suites(recipe):
        suite.read(recipe)
    check_own_metrics(recipe)
    check_suspects(recipe)


def try_inputs(recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
    """Refuse, before training, settings that these rows rule out; `recipe` has its labels resolved.

    Raises:
        RecipeError: metrics of the user's own that fail on reference answers, or labels that are numbers.
        EnvironmentProblem: the judge does not answer a question.
    """
    print_need(recipe, rows, console)
    check_suspects(recipe)
    try_own_metrics(recipe, task, rows, console)
    if recipe.evaluate.judge:
        Judge(recipe.evaluate.judge, recipe.seed).check()


def check_variant(recipe: Recipe, task: EvaluatedTask, model: str) -> None:
    """Refuse suites that this variant of the task cannot run; called once the model's configuration is known.

    Raises RecipeError.
    """
    RecipeError.collect(
        Problem(
            f"{model} is not a decoder language model, but this suite needs {suite.decoder_input}",
            f"evaluate.{name}",
            f"Remove evaluate.{name}, or set model.name to a decoder, such as a Llama or a Qwen.",
        )
        for name, suite in stated_suites(recipe)
        if suite.decoder_input and not task.model_kind.decodes
    )


def compare_suites(
    suites: Sequence[tuple[str, Suite]], rows: PairedMeasures, answers: Mapping[str, Answers]
) -> dict[str, Study]:
    """Return each suite's findings on both models; `rows` and `answers` are those of the test rows."""
    for _, suite in suites:
        suite.row_answers = answers
    return {
        name: join_studies(
            name.capitalize(), SUITE_KEYS.get(name, ()), [suite.compare(rows) for key, suite in suites if key == name]
        )
        for name in dict.fromkeys(name for name, _ in suites)
    }
