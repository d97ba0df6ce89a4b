"""`train.eval_metrics`: answer and score the validation rows with the current model, as `evaluate` does."""

from __future__ import annotations

from collections.abc import Callable, Sized

from rich.console import Console

from llmtune.data.row_store import load_rows, rows_folder
from llmtune.errors import DataError
from llmtune.evaluate.eval_inputs import EvalContext, make_inputs
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.inference import Answers, compute_metrics, predict
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.task_facts import CHOICE_METRICS, PREDICTED, TOOL_METRICS
from llmtune.records import Examples
from llmtune.train.setup import TrainContext

KEY = "train.eval_metrics"
Scores = dict[str, float]


def metrics_of_validation(training: TrainContext, examples: Examples) -> Callable[[], Scores]:
    """Return a function that computes `train.eval_metrics` on the validation rows, with the task's own metrics.

    It puts the model back into training mode. All processes must call it together: they share the rows, and each gets
    all scores.

    Raises DataError if the validation rows lack what a metric needs.
    """
    recipe, task = training.recipe, training.task
    metrics = recipe.train.eval_metrics
    if not metrics or training.validation is None:
        return lambda: {**training.spread}
    assert isinstance(task, EvaluatedTask), "every task that a recipe names is evaluated"
    asked = EvaluateSection(metrics=metrics, choices=recipe.evaluate.choices, samples=0)
    recipe = recipe.model_copy(update={"evaluate": asked})
    processor, rows = training.adapted.selected.processor, load_rows(rows_folder(training.folder))
    inputs = make_inputs(rows, examples, task, processor, recipe, "validation")
    asked_of: dict[str, Sized] = dict.fromkeys(PREDICTED, inputs.answered) | dict.fromkeys(TOOL_METRICS, inputs.turns)
    asked_of |= {} if task.predicts else dict.fromkeys(CHOICE_METRICS, inputs.trees)
    if lacking := [name for name in metrics if not asked_of.get(name, inputs.rows)]:
        what = f"the validation rows lack what {', '.join(lacking)} needs"
        raise DataError.of(what, KEY, "Remove it, or use other rows in data.validation.")
    context = EvalContext(recipe, task, processor, inputs, str(training.device), Console(quiet=True))

    def score() -> Scores:
        model = training.adapted.model
        try:
            answers = predict(model, "validation", context, training.packed)
        finally:
            training.model.train()
        measured = compute_metrics(context, answers, Answers(None, {}, {}))  # no comparison with a base
        return training.spread | {name: one.value for name, one in measured.items() if name in metrics}

    return score
