"""`train.eval_metrics`: the validation rows answered and scored as `evaluate` does, by the model as it stands."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from llmtune.data.row_store import load_rows
from llmtune.errors import DataError
from llmtune.evaluate.eval_inputs import EvalContext, make_inputs
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.inference import Answers, compute_metrics, predict
from llmtune.recipe.evaluate_section import CHOICE, EvaluateSection
from llmtune.recipe.task_facts import PREDICTED, TOOL_METRICS
from llmtune.records import Examples
from llmtune.train.setup import TrainContext

KEY = "train.eval_metrics"
Scores = dict[str, float]


def metrics_of_validation(training: TrainContext, examples: Examples) -> Callable[[], Scores]:
    """Return what measures `train.eval_metrics` on the validation rows; the model is then in training mode again.

    All processes call it together: they share the rows, and each gets all scores.

    Raises DataError where the validation rows do not have what a metric is made of.
    """
    recipe, task = training.recipe, training.task
    metrics = recipe.train.eval_metrics
    if not metrics or training.validation is None:
        return dict
    assert isinstance(task, EvaluatedTask), "every task that a recipe names is evaluated"
    asked = EvaluateSection(metrics=metrics, choices=recipe.evaluate.choices, samples=0)
    recipe = recipe.model_copy(update={"evaluate": asked})
    processor, rows = training.adapted.selected.processor, load_rows(training.folder / "data" / "rows")
    inputs = make_inputs(rows, examples, task, processor, recipe, "validation")
    asked_of = {CHOICE: inputs.trees, **dict.fromkeys(TOOL_METRICS, inputs.turns)}
    asked_of = dict.fromkeys(PREDICTED, inputs.answered) | asked_of
    if lacking := [name for name in metrics if not asked_of.get(name, inputs.rows)]:
        what = f"the validation rows have nothing to measure {', '.join(lacking)} by"
        raise DataError.of(what, KEY, "Remove it, or give data.validation other rows.")
    context = EvalContext(recipe, task, processor, inputs, str(training.device), Console(quiet=True))

    def score() -> Scores:
        model = training.adapted.model
        try:
            answers = predict(model, "validation", context, training.packed)
        finally:
            training.model.train()
        measured = compute_metrics(context, answers, Answers(None, {}, {}))  # nothing is held against a base
        return {name: one.value for name, one in measured.items() if name in metrics}

    return score
