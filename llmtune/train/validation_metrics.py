"""Validation: `train.eval_metrics`, measured as `evaluate` does, the best checkpoint, and whether training stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized

from rich.console import Console

from llmtune.data.row_store import load_rows, rows_folder
from llmtune.errors import DataError
from llmtune.evaluate.eval_inputs import EvalContext, make_inputs
from llmtune.evaluate.inference import Answers, compute_metrics, predict
from llmtune.evaluate.metric_info import better_side
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.task_facts import CHOICE_METRICS, PREDICTED, TOOL_METRICS
from llmtune.records import Examples
from llmtune.train.checkpoint import TrainState
from llmtune.train.setup import TrainContext

KEY = "train.eval_metrics"
Scores = dict[str, float]
CLOSER, COLLAPSED = 0.25, 0.05
"""Warn, and stop, once the distance of unrelated vectors is below this share of the distance before training."""


def metrics_of_validation(training: TrainContext, examples: Examples) -> Callable[[], Scores]:
    """Return a function that computes `train.eval_metrics` on the validation rows, with the task's own metrics.

    It puts the model back into training mode. All processes must call it together: they share the rows, and each gets
    all scores.

    Raises DataError if the validation rows lack what a metric needs.
    """
    recipe, task = training.recipe, training.task
    metrics = recipe.train.eval_metrics
    if not metrics or training.validation is None:
        return lambda: {**training.objective.metrics}
    section = EvaluateSection(metrics=metrics, choices=recipe.evaluate.choices, samples=0)
    recipe = recipe.model_copy(update={"evaluate": section})
    processor, rows = training.adapted.selected.processor, load_rows(rows_folder(training.folder))
    inputs = make_inputs(rows, examples, task, processor, recipe, "validation")
    rows_of_metric: dict[str, Sized] = dict.fromkeys(PREDICTED, inputs.answered) | dict.fromkeys(
        TOOL_METRICS, inputs.turns
    )
    rows_of_metric |= {} if task.predicts else dict.fromkeys(CHOICE_METRICS, inputs.trees)
    if lacking := [name for name in metrics if not rows_of_metric.get(name, inputs.rows)]:
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
        return training.objective.metrics | {name: one.value for name, one in measured.items() if name in metrics}

    return score


def record_validation(training: TrainContext, state: TrainState, loss: float, scores: Scores, console: Console) -> bool:
    """Record the results of a validation, decide on early stopping, and return whether it is the best so far."""
    train = training.recipe.train
    name = train.metric_for_best_model
    value, better = {"loss": loss, **scores}.get(name, math.nan), better_side(name)
    gain = math.inf if state.best_metric is None else better * (value - state.best_metric)
    improved = gain >= 0 and math.isfinite(value)  # of equals the last: its learning rate was the lowest
    state.validation_loss, state.validation_metrics = loss, scores
    state.stale_validations = 0 if improved and gain > train.early_stopping_threshold else state.stale_validations + 1
    if improved:
        state.best_metric, state.best_loss, state.best_step = value, loss, state.step
    patience, more = train.early_stopping_patience, state.step < training.plan.total_steps
    if patience is not None and state.stale_validations >= patience and more:
        best = "none" if state.best_metric is None else f"{state.best_metric:.4f} (step {state.best_step})"
        state.stopped_early = f"{name} did not improve in {patience} validations; best {best}"
    collapse, stops = find_collapse(state.first_spread, training.objective.metrics)
    if collapse:
        state.collapse = f"After step {state.step}, {collapse}"
        console.print(f"{state.collapse} Lower train.learning_rate.", style="yellow", highlight=False)
    if stops and more:
        state.stopped_early = "the vectors collapsed"
    if state.stopped_early:
        console.print(f"Stopped early after step {state.step}: {state.stopped_early}.")
    return improved


def find_collapse(before: Scores, now: Scores) -> tuple[str, bool]:
    """Return how vectors came closer together since before training, if much, and whether nothing is left of them.

    Vectors that are nearly equal for all texts tell nothing apart, and training does not recover from it.
    """
    if not before or not now:
        return "", False
    name = "random_cosine"
    left = (1 - now[name]) / max(1 - before[name], 1e-9)
    if left >= CLOSER:
        return "", False
    what = f"unrelated texts have a cosine of {now[name]:.3f}, and of {before[name]:.3f} before training"
    rank = f"effective rank {before['effective_rank']:.1f} before, {now['effective_rank']:.1f} now"
    return f"the vectors collapse: {what} ({rank}).", left < COLLAPSED
