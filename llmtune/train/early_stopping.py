"""What a validation decides: whether it is the best so far, and whether training stops."""

from __future__ import annotations

import math

from rich.console import Console

from llmtune.report.metric_info import better_side
from llmtune.train.checkpoint import TrainState
from llmtune.train.setup import TrainContext
from llmtune.train.validation_metrics import Scores

CLOSER, COLLAPSED = 0.25, 0.05
"""Warn, and stop, once the distance of unrelated vectors is below this share of the distance before training."""


def record_validation(training: TrainContext, state: TrainState, loss: float, scores: Scores, console: Console) -> bool:
    """Record the results of a validation, decide on early stopping, and return whether it is the best so far."""
    train = training.recipe.train
    name = train.metric_for_best_model
    value, better = {"loss": loss, **scores}.get(name, math.nan), better_side(name)
    gain = math.inf if state.best_metric is None else better * (value - state.best_metric)
    improved = gain > 0 and math.isfinite(value)
    state.validation_loss, state.validation_metrics = loss, scores
    state.stale_validations = 0 if improved and gain > train.early_stopping_threshold else state.stale_validations + 1
    if improved:
        state.best_metric, state.best_loss, state.best_step = value, loss, state.step
    patience, more = train.early_stopping_patience, state.step < training.plan.total_steps
    if patience is not None and state.stale_validations >= patience and more:
        best = "none" if state.best_metric is None else f"{state.best_metric:.4f} (step {state.best_step})"
        state.stopped_early = f"{name} did not improve in {patience} validations; best {best}"
    collapse, stops = find_collapse(state.first_spread, training.spread)
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
