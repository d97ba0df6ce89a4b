"""The evaluation suites, and whether they can run: checked before anything heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.controls import try_controls
from llmtune.evaluate.decision import print_need
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.inference import Answers
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.suites import Suite
from llmtune.evaluate.suites.benchmarks import BenchmarkSuite
from llmtune.evaluate.suites.eval_suite import EvalSuite, join_studies
from llmtune.evaluate.suites.forgetting import ForgettingSuite
from llmtune.evaluate.suites.group_gaps import GroupGapSuite
from llmtune.evaluate.suites.judge import JudgeSuite
from llmtune.evaluate.suites.label_errors import LabelErrorSuite
from llmtune.evaluate.suites.own_metrics import OwnMetricSuite
from llmtune.evaluate.suites.swapped_rows import SwapSuite
from llmtune.recipe.eval_suites_section import SUITE_KEYS
from llmtune.recipe.schema import Recipe
from llmtune.records import Rows
from llmtune.store.score_records import Study

SUITES: tuple[type[Suite], ...] = (
    ForgettingSuite,
    SwapSuite,
    GroupGapSuite,
    BenchmarkSuite,
    LabelErrorSuite,
    OwnMetricSuite,
    JudgeSuite,
)
"""All suites, in the order of the report."""


def requested_suites(recipe: Recipe) -> list[type[Suite]]:
    """Return the suites that the recipe names."""
    return [suite for suite in SUITES if suite.is_requested(recipe)]


def make_suites(context: EvalContext) -> list[EvalSuite[Any]]:
    """Return the suites that run models, with inputs read and checked before a model is loaded.

    Raises DataError for inputs that cannot be read or used.
    """
    suites = [suite(context) for suite in requested_suites(context.recipe) if issubclass(suite, EvalSuite)]
    for suite in suites:
        if suite.unmeasured:
            what = f"{suite.key}.{next(iter(suite.metrics))}: {suite.unmeasured}"
            context.console.print(what, style="dim", highlight=False)
    return suites


def check_inputs(recipe: Recipe) -> None:
    """Read the inputs of all suites when a run starts, to report missing files before training (`Suite.read`)."""
    for suite in requested_suites(recipe):
        suite.read(recipe)


def try_inputs(recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
    """Refuse, before training, settings that these rows rule out (`Suite.try_out`)."""
    print_need(recipe, rows, console)
    try_controls(recipe, task, rows, console)
    for suite in requested_suites(recipe):
        suite.try_out(recipe, task, rows, console)


def check_variant(recipe: Recipe, task: EvaluatedTask, model: str) -> None:
    """Refuse suites that this variant of the task cannot run; called once the model's configuration is known.

    Raises RecipeError.
    """
    RecipeError.collect(
        Problem(
            f"{model} is not a decoder language model, but this suite needs {suite.decoder_input}",
            f"evaluate.{suite.key}",
            f"Remove evaluate.{suite.key}, or set model.name to a decoder, such as a Llama or a Qwen.",
        )
        for suite in requested_suites(recipe)
        if issubclass(suite, EvalSuite) and suite.decoder_input and not task.model_kind.decodes
    )


def compare_suites(
    suites: Sequence[EvalSuite[Any]], rows: PairedMeasures, answers: Mapping[str, Answers]
) -> dict[str, Study]:
    """Return each suite's findings on both models; `rows` and `answers` are those of the test rows."""
    for suite in suites:
        suite.row_answers = answers
    return {
        name: join_studies(
            name.capitalize(), SUITE_KEYS.get(name, ()), [suite.compare(rows) for suite in suites if suite.key == name]
        )
        for name in dict.fromkeys(suite.key for suite in suites)
    }
