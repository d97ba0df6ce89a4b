"""Detect training that went wrong (a non-finite or diverged loss), and explain it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from llmtune.adapter.reference_model import own_part
from llmtune.errors import Problem, TrainingError
from llmtune.train.accumulation import StepLoss, find_guilty_rows
from llmtune.train.checkpoint import LossHistory, TrainState, list_checkpoints
from llmtune.train.distributed import any_process, gather_lists
from llmtune.train.setup import TrainContext

SHOWN_ROWS = 10
WINDOW = 10
"""Number of steps in the median; up to four bad batches do not move it."""
LEAST_RISE = 4.0
"""Nats above the best so far at which a loss counts as diverged; e^4: each token is about 50 times less likely."""
IDLE_STEPS = 10
"""Training ends if its first steps, this many, have no gradient; or all steps of an epoch, or of the training."""
FAR = 10
"""Multiple of the initial loss that counts as diverged, for losses without a scale of their own."""


@dataclass
class Divergence:
    """Watches the loss of each step.

    Training on tokens (nats per supervised token) counts as diverged when the median of the last ten steps
    - is more than one nat worse than both guessing every token at random and the first step; or
    - is above twice the best so far and at least four nats above it. The best so far is the loss of the first step,
      which is that of the untrained model, or the lowest median of ten steps.

    A pretrained model that diverges ends near the loss of guessing (about 10 nats), from a start near 2. Rows of
    different difficulty do not move a median of ten by four nats. The losses of other tasks, such as a squared error,
    have no such scale: their median must be far above both the first step and guessing.
    """

    guessing: float
    """Loss of guessing: the logarithm of the vocabulary's size, or the variance of the numbers to predict."""
    on_tokens: bool = True
    first: float | None = None
    best: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def observe(self, loss: float) -> str | None:
        """Record the loss of the next step; return what is wrong, or None."""
        if self.first is None or self.best is None:
            self.first = self.best = loss
        self.recent.append(loss)
        if len(self.recent) < WINDOW:
            return None
        now = median(self.recent)
        if not self.on_tokens:
            start = max(self.first, self.guessing)
            if now <= FAR * start:
                return None
            times = f"{now / start:.0f} times that of the start" if start else "after 0"
            return f"the loss diverged: its median over the last {WINDOW} steps is {now:.4g}, {times}"
        if now > max(self.guessing, self.first) + 1:
            return (
                f"the loss diverged: its median over the last {WINDOW} steps is {now:.2f}, worse than guessing every "
                f"token at random ({self.guessing:.2f})"
            )
        if now > self.best + max(LEAST_RISE, self.best):
            return f"the loss diverged: its median over the last {WINDOW} steps is {now:.2f}, after {self.best:.2f}"
        self.best = min(self.best, now)
        return None

    def save(self) -> LossHistory:
        """Return the state that a checkpoint must keep."""
        return {"first": self.first, "best": self.best, "recent": list(self.recent)}

    def restore(self, history: LossHistory) -> None:
        """Restore the state that `save` returned."""
        self.first, self.best = history["first"], history["best"]
        self.recent = deque(history["recent"], maxlen=WINDOW)


def note_figures(training: TrainContext, state: TrainState, step: int) -> None:
    """Add the objective's figures of a step to `state`; raise TrainingError after too many steps without a gradient."""
    idle, epoch = training.objective.idle, training.plan.steps_per_epoch
    first = min(IDLE_STEPS, epoch, training.plan.total_steps)
    state.idle_steps = state.idle_steps + 1 if idle else 0
    state.skipped_steps += idle is not None
    if idle and state.idle_steps >= (first if state.idle_steps == step else epoch):
        what = f"no update in {state.idle_steps} steps, up to step {step}: {idle.what}"
        raise TrainingError.of(what, idle.where, idle.fix)
    state.log_steps += 1
    for name, value in training.objective.figures.items():
        state.log_figures[name] = state.log_figures.get(name, 0.0) + value


def non_finite_error(training: TrainContext, step: int, loss: StepLoss, learning_rate: float) -> TrainingError:
    """Explain a non-finite loss or gradient, with the training examples that cause it; all processes must call it."""
    figures = _figures(loss.mean, loss.grad_norm, learning_rate)
    if not weights_are_numbers(training):
        what = f"the trained weights are not finite in step {step}: the previous update was too large"
        return _describe_divergence(training, step, figures, what, [])
    if math.isfinite(loss.mean):
        what = f"the gradient is {loss.grad_norm} in step {step}, though the loss is {loss.mean:.4f}"
        return _describe_divergence(training, step, figures, what, training.plan.rows(step).tolist())
    guilty = find_guilty_rows(training, gather_lists(training.accelerator, loss.suspects.tolist()))
    return _describe_divergence(training, step, figures, f"the loss is {loss.mean} in step {step}", guilty)


def weights_are_numbers(training: TrainContext) -> bool:
    """Return whether all trained weights are finite, in every process."""
    # aminmax propagates NaN, and unlike isfinite() on the weights it allocates nothing of the model's size.
    parts = [own_part(weight).detach() for weight in training.parameters]
    finite = all(bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in parts if part.numel())
    return not any_process(training.accelerator, not finite)


def ruined_weights_error(
    training: TrainContext, step: int, loss: float, grad_norm: float, learning_rate: float
) -> TrainingError:
    """Explain weights that the update of `step` made non-finite; `loss` and `grad_norm` are from before the update."""
    what = f"the trained weights are not finite after the update of step {step}: it was too large"
    return _describe_divergence(training, step, _figures(loss, grad_norm, learning_rate), what, [])


def divergence_error(
    training: TrainContext, step: int, loss: StepLoss, learning_rate: float, what: str
) -> TrainingError:
    """Explain a diverged loss."""
    figures = _figures(loss.mean, loss.grad_norm, learning_rate)
    return _describe_divergence(training, step, figures, f"{what}, in step {step}", [])


def name_last_checkpoint(folder: Path) -> str:
    """Name the newest checkpoint of a run."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    return f"The last good checkpoint is {checkpoints[0]}." if checkpoints else "No checkpoint was saved yet."


def _figures(loss: float, grad_norm: float, learning_rate: float) -> str:
    return f"loss {loss:.4f}, learning rate {learning_rate:.2e}, gradient norm {grad_norm:.3g}"


def _describe_divergence(
    training: TrainContext, step: int, figures: str, what: str, guilty: list[int]
) -> TrainingError:
    train = training.recipe.train
    ways = [f"lower train.learning_rate (now {train.learning_rate:g})"]
    if not 0 < train.max_grad_norm <= 1:
        ways.append("set train.max_grad_norm: 1.0")
    if train.warmup_steps == 0:
        ways.append("set train.warmup_steps: 0.03")
    if training.dtype == torch.float16:
        ways.append("set model.dtype: bfloat16 or float32")
    problems = [
        Problem(what, f"step {step}: {figures}", f"{name_last_checkpoint(training.folder)} Try: {'; '.join(ways)}.")
    ]
    if guilty:
        rows = sorted({int(training.examples.rows[index]) for index in guilty})
        shown = ", ".join(str(row) for row in rows[:SHOWN_ROWS]) + (", ..." if len(rows) > SHOWN_ROWS else "")
        problems.append(Problem(f"check these rows of the step: {shown}", "data (train split, counted from 0)"))
    return TrainingError(*problems)
