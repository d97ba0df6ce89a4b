"""Saves the state of a training as a checkpoint, and resumes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape

from llmtune.store.atomic_files import remove_unfinished
from llmtune.store.json_shapes import KEPT_START, METRICS
from llmtune.train.checkpoint import (
    SHARDS,
    Checkpoint,
    Damage,
    TrainState,
    named_trainable,
    newest_checkpoint,
    read_checkpoint,
    trainable_weights,
    write_checkpoint,
)
from llmtune.train.distributed import run_on_main
from llmtune.train.divergence import Divergence
from llmtune.train.metrics_log import cut_back
from llmtune.train.setup import TrainContext
from llmtune.train.sharded_checkpoint import cut_state, read_shards, write_shards
from llmtune.train.sharding import load_whole


def take_best(training: TrainContext, state: TrainState, console: Console) -> None:
    """Load the weights of the best checkpoint, with its optimiser state if the weights are averages of a schedule."""
    best = read_checkpoint(training.checkpoints / f"step-{state.best_step}")
    if isinstance(best, Damage):
        console.print(f"[yellow]The best checkpoint is damaged ({best.reason}); using the last step.[/]")
        return
    if state.best_step == 0:
        console.print(KEPT_START, style="yellow", highlight=False)
    if not hasattr(training.optimizer.optimizer, "eval"):
        training.optimizer.optimizer.state.clear()  # no step follows; a sharded checkpoint reads a second state
        restore_weights(training, best)
        return
    seen = training.row_losses.copy()
    restore_checkpoint(training, best)
    training.row_losses[:] = seen


def save(training: TrainContext, state: TrainState, folder: Path) -> None:
    """Write a checkpoint of the current training state; every process waits for it.

    Raises EnvironmentProblem in every process if the main one cannot write.
    """
    optimizer, shards = training.optimizer.state_dict(), None
    if training.sharded:
        optimizer, shards = {**optimizer, "state": {}}, write_shards(training, folder)
    run_on_main(
        training.accelerator,
        lambda: write_checkpoint(
            folder,
            shards or trainable_weights(training.adapted.model),
            {
                "optimizer": optimizer,
                "schedule": training.schedule.state_dict(),
                "row_losses": torch.from_numpy(training.row_losses),
            },
            state,
            training.inputs,
        ),
    )


def restore_checkpoint(training: TrainContext, checkpoint: Checkpoint) -> None:
    """Restore weights, optimiser and schedule from `checkpoint`, in place."""
    training.optimizer.optimizer.state.clear()
    state = restore_weights(training, checkpoint)
    training.optimizer.load_state_dict({**checkpoint.optimizer["optimizer"], "state": state})
    training.schedule.load_state_dict(checkpoint.optimizer["schedule"])
    training.row_losses[:] = checkpoint.optimizer["row_losses"].numpy() if "row_losses" in checkpoint.optimizer else 0
    training.optimizer.zero_grad(set_to_none=True)


def restore_weights(training: TrainContext, checkpoint: Checkpoint) -> dict[int, dict[str, Any]]:
    """Restore the weights from `checkpoint`, in place; return its optimiser state."""
    if not checkpoint.weights:  # of a sharded model
        return read_shards(training, checkpoint.folder / SHARDS)
    load_whole(named_trainable(training.adapted.model), checkpoint.weights)
    return cut_state(training, cast(Any, checkpoint.optimizer["optimizer"]["state"]))


def resume(training: TrainContext, state: TrainState, divergence: Divergence, console: Console) -> int | None:
    """Clean up after an interrupted run, and restore the newest complete checkpoint.

    Returns the step of the checkpoint; None without one.
    """
    checkpoint: Checkpoint | Damage | None = None

    def prepare() -> str | None:
        nonlocal checkpoint
        remove_unfinished(training.checkpoints)
        remove_unfinished(training.folder)
        checkpoint = newest = newest_checkpoint(training.checkpoints, training.inputs, console)
        # A stop saves a step before its line is written, so the resumed run writes it. After a kill the line may exist.
        cut_back(training.folder / METRICS, newest.state.closed if newest else 0)
        return newest.folder.name if newest else None

    name = run_on_main(training.accelerator, prepare)
    if name is None:
        return None
    checkpoint = checkpoint or read_checkpoint(training.checkpoints / name)  # the other processes read it too
    assert isinstance(checkpoint, Checkpoint), "rank 0 just read it"
    restore_checkpoint(training, checkpoint)
    budget = min(state.budget, checkpoint.state.budget)
    vars(state).update(vars(checkpoint.state))
    state.budget = max(budget, training.longest)
    divergence.restore(checkpoint.state.divergence)
    total = training.plan.total_steps
    console.print(f"Resuming from step {state.step} of {total} ({escape(str(checkpoint.folder))}).")
    return state.step
