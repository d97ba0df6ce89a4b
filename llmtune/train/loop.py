"""The training loop, the same for every task: read `train` first, then `_take_step` and `_close_step`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console

from llmtune.adapter.saving import save_adapter, stored_dtype
from llmtune.errors import Problem, Stopped, TrainingError
from llmtune.model.device import fits_in_memory, keep_freed_memory
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, Examples
from llmtune.store.json_shapes import METRICS
from llmtune.store.machine import seconds_of_process
from llmtune.train.accumulation import MicroBatchTooLarge, StepLoss, step_gradients, validation_loss
from llmtune.train.batch_plan import padding_share
from llmtune.train.checkpoint import (
    TrainState,
    remove_put_aside,
    rotate,
    staged_on_disk,
)
from llmtune.train.distributed import run_on_main, sum_over_processes
from llmtune.train.divergence import (
    Divergence,
    divergence_error,
    name_last_checkpoint,
    non_finite_error,
    note_figures,
    ruined_weights_error,
    weights_are_numbers,
)
from llmtune.train.metrics_log import (
    Display,
    MetricsLine,
    TrainedRun,
    append_line,
    end_trackers,
    show_training,
    tracker_names,
)
from llmtune.train.objective import TrainedTask
from llmtune.train.optimizer import averaged_weights, set_mode
from llmtune.train.preflight import run_preflight, shrink_budget
from llmtune.train.resume import resume, save, take_best
from llmtune.train.row_losses import add_step, save_row_losses
from llmtune.train.setup import TrainContext, deterministic, peak_bytes, set_up
from llmtune.train.sharding import whole_state
from llmtune.train.signals import StopRequest, catch_signals
from llmtune.train.validation_metrics import Scores, metrics_of_validation, record_validation

FIRST_SCALE = 2.0**16
"""Initial loss scale of float16; when a gradient overflows, it is halved and the step is repeated."""

SCALE_GROWS = 1000
"""Interval in steps at which a reduced loss scale is doubled again."""


@dataclass
class Run:
    """The state of a training in progress."""

    training: TrainContext
    state: TrainState
    divergence: Divergence
    request: StopRequest
    display: Display
    console: Console
    on_budget: Callable[[int], None]
    rehearsal_seconds: float = 0.0
    seconds_to_first_step: float | None = None
    measure: Callable[[], Scores] = dict
    """Measures `train.eval_metrics`."""


def train(
    adapted: AdaptedModel,
    examples: Examples,
    task: TrainedTask,
    recipe: Recipe,
    folder: Path,
    console: Console,
    *,
    budget: int,
    inputs: str,
    on_budget: Callable[[int], None] = lambda tokens: None,
    sharded: bool = False,
) -> TrainedRun:
    """Train `adapted` in place and leave `checkpoints/`, `metrics.jsonl` and `adapter/` (or `weights/`) in `folder`.

    `sharded` says whether each process holds a shard of the model (FSDP2) or all of it.
    `budget` is the initial number of tokens in a micro-batch; `on_budget` is called when it changes. Training resumes
    from the newest complete checkpoint, and the result is bit-identical. `inputs` is the hash of everything that
    training depends on. Checkpoints of other inputs are moved aside. An earlier adapter is replaced only at the end.

    Raises:
        Stopped: SIGINT or SIGTERM arrived; a checkpoint is saved.
        TrainingError: the loss diverged or is not finite, or not even one row fits into memory.
        EnvironmentProblem: the disk is full or not writable, or a tracker or an optimiser is not available.
        RecipeError: the schedule or `batch_tokens` is invalid.
    """
    with deterministic(), keep_freed_memory() if recipe.adapter.method == "full" else nullcontext():
        training = set_up(adapted, examples, task, recipe, folder, console, inputs, sharded)
        measure = metrics_of_validation(training, examples)
        half = training.dtype == torch.float16
        state = TrainState(budget=max(budget, training.longest), loss_scale=FIRST_SCALE if half else 1.0)
        guessing = task.guessing_loss(adapted.selected.model.config, training.examples, recipe)
        divergence = Divergence(guessing, task.predicts_tokens)
        resumed = resume(training, state, divergence, console)
        rehearsed = time.perf_counter()
        with catch_signals(console) as request:
            if state.step < training.plan.total_steps and not state.stopped_early:
                run_preflight(training, state, console, on_budget)
            rehearsed = time.perf_counter() - rehearsed
            if training.accelerator.is_main_process:
                on_budget(state.budget)
            if training.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(training.device)
            with show_training(console, state.step, training.plan.total_steps) as display:
                run = Run(
                    *(training, state, divergence, request, display, console, on_budget, rehearsed), measure=measure
                )
                _run_steps(run)
            adapter = _finish(run)
            _stop_if_asked(run)
        if recipe.train.report_to:
            end_trackers(training.accelerator)
        return _summary(run, adapter, resumed)


def _run_steps(run: Run) -> None:
    state, total, objective = run.state, run.training.plan.total_steps, run.training.objective
    if state.step == 0 and run.training.validation is not None:
        if objective.measures_start:
            _validate(run)  # how far apart vectors are before training
            state.first_spread = {**objective.metrics}
        if run.training.head_started and state.best_step is None:
            _measure_start(run)
    run.training.model.train()
    _stop_if_asked(run)
    while True:
        if state.closed < state.step:
            _close_step(run)
            _stop_if_asked(run)
        if state.step == total or state.stopped_early:
            return
        _take_step(run)
        _stop_if_asked(run)


def _measure_start(run: Run) -> None:
    """Validate before step 1, as a head that starts at a regression may already be the best; save it then."""
    loss = _validate(run)
    if loss is None:
        return
    record_validation(run.training, run.state, loss, run.measure(), run.console)
    if run.training.recipe.train.load_best_model_at_end:
        _checkpoint(run)


def _take_step(run: Run) -> None:
    """Take one optimiser step: gradients, checks, update."""
    training, state = run.training, run.state
    started = time.perf_counter()
    step = state.step + 1
    loss = _gradients(run, step)
    state.learning_rate, state.grad_norm = training.optimizer.param_groups[0]["lr"], loss.grad_norm
    if not loss.finite:
        raise non_finite_error(training, step, loss, state.learning_rate)
    wrong = run.divergence.observe(loss.mean)
    if wrong is not None:
        raise divergence_error(training, step, loss, state.learning_rate, wrong)
    _update(run, step)
    note_figures(training, state, step)
    seconds = time.perf_counter() - started
    if run.seconds_to_first_step is None:
        run.seconds_to_first_step = seconds_of_process() - run.rehearsal_seconds
    state.step = step
    add_step(training.row_losses, loss, training.examples.supervised)
    state.tokens += loss.tokens
    state.supervised += loss.count
    state.seconds += seconds
    state.first_loss = loss.mean if state.first_loss is None else state.first_loss
    state.log_sum += loss.sum
    state.log_count += loss.count
    state.log_tokens += loss.tokens
    state.log_seconds += seconds
    run.display.step(step, loss.mean, loss.tokens / seconds, peak_bytes(training.device), training.objective.figures)


def _gradients(run: Run, step: int) -> StepLoss:
    """Compute the step's gradients; retry with a smaller budget if memory ran out, with a lower scale on overflow."""
    training, state = run.training, run.state
    while True:
        try:
            loss = step_gradients(training, step, state.budget, state.loss_scale)
        except MicroBatchTooLarge as error:
            shrink_budget(training, state, run.console, run.on_budget, f"step {step}", error)
        else:
            if loss.finite or state.loss_scale <= 1 or not math.isfinite(loss.mean):
                return loss
            state.loss_scale /= 2
        training.optimizer.zero_grad(set_to_none=True)


def _update(run: Run, step: int) -> None:
    training = run.training
    if training.objective.idle:
        training.schedule.step()
        return
    if not fits_in_memory(training.optimizer.step):
        # Some weights may already be updated, so the step cannot be repeated.
        raise TrainingError.of(
            f"out of memory in the update of step {step}, although it fit in the rehearsal",
            str(run.training.device),
            f"Another program took memory. {name_last_checkpoint(run.training.folder)}",
        )
    training.schedule.step()
    training.optimizer.zero_grad(set_to_none=True)
    if 1 < run.state.loss_scale < FIRST_SCALE and step % SCALE_GROWS == 0:
        run.state.loss_scale *= 2


def _close_step(run: Run) -> None:
    """Validate, log and save as the recipe asks at this step; decide whether to stop early."""
    training, state, train = run.training, run.state, run.training.recipe.train
    step = state.step
    last = step == training.plan.total_steps
    epoch_end = training.plan.ends_epoch(step)
    validates = training.validation is not None and (
        last or (epoch_end if train.eval_steps is None else step % train.eval_steps == 0)
    )
    improved, loss = False, None
    if validates:
        with averaged_weights(training.optimizer.optimizer):
            loss = _validate(run)
            scores = {} if loss is None else run.measure()
        if loss is None:
            return  # interrupted: repeated when training resumes
        improved = record_validation(training, state, loss, scores, run.console)
    if step == 1 or last or validates or state.stopped_early or step % train.logging_steps == 0:
        _log(run, validates)
    state.closed = step
    due = (validates or epoch_end) if train.save_steps is None else step % train.save_steps == 0
    if due or last or state.stopped_early or (improved and train.load_best_model_at_end):
        _checkpoint(run)


def _validate(run: Run) -> float | None:
    training, state = run.training, run.state
    while True:
        try:
            loss = validation_loss(training, state.budget, lambda: run.request.signal_number is not None)
        except MicroBatchTooLarge as error:
            shrink_budget(training, state, run.console, run.on_budget, "validation", error)
            continue
        if loss is not None and not math.isfinite(loss):
            raise TrainingError.of(
                f"the validation loss is {loss} after step {state.step}, though the training loss is a number",
                "validation",
                f"Lower train.learning_rate. {name_last_checkpoint(training.folder)}",
            )
        return loss


def _log(run: Run, validated: bool) -> None:
    """Log to metrics.jsonl, the trackers and the display; figures cover the steps since the previous line."""
    training, state = run.training, run.state
    line: MetricsLine = {
        "step": state.step,
        "epoch": round(state.step / training.plan.steps_per_epoch, 6),
        "loss": state.log_sum / max(1, state.log_count),
        "learning_rate": state.learning_rate,
        "grad_norm": state.grad_norm,
        "tokens_per_second": state.log_tokens / max(1e-9, state.log_seconds),
        "peak_bytes": peak_bytes(training.device),
    }
    if state.log_figures:
        line["figures"] = {name: value / state.log_steps for name, value in state.log_figures.items()}
        state.log_figures, state.log_steps = {}, 0
    if validated:
        line["validation_loss"] = state.validation_loss
        line["validation_metrics"] = state.validation_metrics
    state.log_sum, state.log_count, state.log_tokens, state.log_seconds = 0.0, 0, 0, 0.0
    run_on_main(training.accelerator, lambda: append_line(training.folder / METRICS, line))
    if training.recipe.train.report_to:
        values = {key: value for key, value in line.items() if key not in ("step", "validation_metrics", "figures")}
        values |= line.get("figures", {})
        values |= {f"validation_{name}": value for name, value in line.get("validation_metrics", {}).items()}
        training.accelerator.log(tracker_names(values), step=state.step)
    run.display.line(line)


def _checkpoint(run: Run) -> Path:
    training, state = run.training, run.state
    if not weights_are_numbers(training):
        raise ruined_weights_error(
            training, state.step, run.divergence.recent[-1], state.grad_norm, state.learning_rate
        )
    state.divergence = run.divergence.save()
    folder = training.checkpoints / f"step-{state.step}"
    save(training, state, folder)
    _rotate_checkpoints(run)
    return folder


def _rotate_checkpoints(run: Run) -> None:
    training, settings = run.training, run.training.recipe.train
    best = run.state.best_step if settings.load_best_model_at_end else None
    run_on_main(training.accelerator, lambda: rotate(training.checkpoints, settings.save_total_limit, best))


def _stop_if_asked(run: Run) -> None:
    """Save and raise Stopped if any process got a signal."""
    number = run.request.signal_number
    interrupts, terminations = sum_over_processes(run.training.accelerator, [float(number == 2), float(number == 15)])
    if not interrupts and not terminations:
        return
    total = run.training.plan.total_steps
    number, name = (2, "Ctrl-C") if interrupts else (15, "SIGTERM")
    if run.state.step == 0:
        what, where = f"stopped by {name} before step 1", None
    else:
        saved = run.training.checkpoints / f"step-{run.state.step}"
        # Only rank 0 checks: on a network disk other machines may see the file later.
        there = run_on_main(run.training.accelerator, saved.exists)
        where = str(saved if there else _checkpoint(run))
        what = f"stopped by {name} after step {run.state.step} of {total}; a checkpoint is saved"
    raise Stopped(Problem(what, where, "Run the same command again to resume."), signal_number=number)


def _finish(run: Run) -> Path:
    """Restore the best weights if the recipe asks for them, and save the adapter (or the weights)."""
    training, state = run.training, run.state
    if training.recipe.train.load_best_model_at_end and state.best_step not in (None, state.step):
        take_best(training, state, run.console)
    set_mode(training.optimizer.optimizer, "eval")
    full = training.adapted.method == "full"
    folder = training.folder / ("weights" if full else "adapter")
    dtype = stored_dtype(training.adapted.selected) if full else None
    whole = whole_state(training.adapted.model, trained_only=not full, dtype=dtype)
    run_on_main(training.accelerator, lambda: _save(training, folder, whole))
    run_on_main(training.accelerator, lambda: save_row_losses(training.row_losses, training.examples, training.folder))
    run_on_main(training.accelerator, lambda: remove_put_aside(training.checkpoints, run.console))
    _rotate_checkpoints(run)  # a process that was killed after its last checkpoint did not
    return folder


def _save(training: TrainContext, folder: Path, whole: dict[str, torch.Tensor] | None) -> None:
    with staged_on_disk(folder) as target:
        save_adapter(training.adapted, target, whole)
        training.task.save_files(target, training.adapted.selected.model.config, training.recipe)


def _summary(run: Run, adapter: Path, resumed: int | None) -> TrainedRun:
    training, state = run.training, run.state
    return TrainedRun(
        adapter=adapter,
        steps=state.step,
        epochs=state.step / training.plan.steps_per_epoch,
        train_loss=fmean(run.divergence.recent),
        first_loss=state.first_loss or 0.0,
        validation_loss=state.best_loss if training.recipe.train.load_best_model_at_end else state.validation_loss,
        best_step=state.best_step,
        tokens=state.tokens,
        supervised_tokens=state.supervised,
        tokens_per_second=state.tokens / max(1e-9, state.seconds),
        wall_seconds=state.seconds,
        peak_bytes=peak_bytes(training.device),
        micro_batch_tokens=state.budget,
        stopped_early=state.stopped_early,
        collapse=state.collapse,
        resumed_from=resumed,
        skipped_steps=state.skipped_steps,
        rehearsal_seconds=run.rehearsal_seconds,
        seconds_to_first_step=run.seconds_to_first_step,
        padding_share=padding_share(
            training.plan,
            state.step,
            state.budget,  # the final one
            training.packed,
            training.accelerator.num_processes,
            training.pass_tokens,
        ),
    )
