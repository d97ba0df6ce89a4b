"""Atomic checkpoints: written under a temporary name, hashed, flushed to disk, then renamed.

A checkpoint is a folder `step-N` with `trainable.safetensors` (trainable weights by parameter name), `optimizer.pt`
(optimiser and schedule) and `state.json` (counters, and the sha256 of the other files). If the model is sharded,
`shards/` contains weights and optimiser state as torch.distributed.checkpoint writes them.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NotRequired

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from llmtune.display.number_format import size
from llmtune.errors import EnvironmentProblem, system_errno
from llmtune.model.device import MEMORY_ERRORS, is_out_of_memory
from llmtune.recipe.user_files import read_text_file
from llmtune.store.atomic_files import hash_file, hash_value, staged
from llmtune.store.cleaning import measure_bytes
from llmtune.store.json_shapes import METRICS

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"
SHARDS = "shards"
STATE = "state.json"
_NAME = re.compile(r"step-([1-9][0-9]*)")


class LossHistory(TypedDict, total=False):
    """Saved state of a `Divergence`; empty before the first step."""

    first: float | None
    best: float | None
    recent: list[float]


@dataclass
class TrainState:
    """Counters and results of a training so far; changed by the loop, saved with each checkpoint."""

    budget: int
    """Tokens in a micro-batch."""
    step: int = 0
    """Optimiser steps done."""
    closed: int = 0
    """The last step that was logged, validated and saved as the recipe asks; less than `step` after a stop between."""
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    """Time spent in steps, without validation and saving."""
    first_loss: float | None = None
    learning_rate: float = 0.0
    """Of the last step, like the gradient norm."""
    grad_norm: float = 0.0
    log_sum: float = 0.0
    log_count: int = 0
    log_tokens: int = 0
    log_seconds: float = 0.0
    log_figures: dict[str, float] = field(default_factory=dict)
    """Sums of the objective's figures since the last logged step."""
    log_steps: int = 0
    idle_steps: int = 0
    """Steps in a row without a gradient."""
    skipped_steps: int = 0
    """All steps without a gradient."""
    validation_loss: float | None = None
    best_loss: float | None = None
    """The validation loss at the best step."""
    best_metric: float | None = None
    """`metric_for_best_model` at the best step."""
    validation_metrics: dict[str, float] = field(default_factory=dict)
    """`eval_metrics` of the last validation."""
    best_step: int | None = None
    stale_validations: int = 0
    """Validations in a row that were not better by `early_stopping_threshold`."""
    stopped_early: str | None = None
    first_spread: dict[str, float] = field(default_factory=dict)
    """How far apart the vectors of the validation rows are before training; empty for other tasks."""
    collapse: str | None = None
    """The last warning that vectors come too close."""
    loss_scale: float = 1.0
    """Factor of the loss in float16; 1 in every other format."""
    divergence: LossHistory = field(default_factory=LossHistory)


class CheckpointState(TypedDict):
    """The content of state.json."""

    fingerprint: str
    files: dict[str, str]
    """sha256 of the other files."""
    state: TrainState


class OptimizerState(TypedDict):
    """The state dictionaries of optimiser and schedule, and the losses of the rows so far."""

    optimizer: dict[str, object]
    schedule: dict[str, object]
    row_losses: NotRequired[torch.Tensor]
    """Missing in checkpoints of earlier versions."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a complete checkpoint."""

    folder: Path
    state: TrainState
    weights: dict[str, torch.Tensor]
    """Empty for a sharded model, whose weights and optimiser state are in `shards/`."""
    optimizer: OptimizerState
    inputs: str
    """Hash of everything that training depended on."""


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint cannot be used."""

    folder: Path
    reason: str


def named_trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters by name, on the CPU (not copied if there already); tied ones once."""
    return {name: one.detach().to("cpu").contiguous() for name, one in named_trainable(model).items()}


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, torch.Tensor] | Path,
    optimizer: OptimizerState,
    state: TrainState,
    inputs: str,
) -> Path:
    """Write the checkpoint `folder`, replacing one of the same name; `weights` may be a folder of shards to move there.

    Raises EnvironmentProblem if the disk is full or not writable; an earlier checkpoint is then untouched.
    """
    with staged_on_disk(folder) as target:
        if isinstance(weights, Path):
            weights.rename(target / SHARDS)
        else:
            save_file(dict(weights), target / WEIGHTS)
        with (target / OPTIMIZER).open("wb") as file:
            torch.save(dict(optimizer), file)
        files = sorted(path for path in target.rglob("*") if path.is_file())
        hashes = {path.relative_to(target).as_posix(): hash_file(path) for path in files}
        content = {"format": 1, "fingerprint": inputs, "files": hashes, "state": asdict(state)}
        content["sha256"] = hash_value(content)
        (target / STATE).write_text(json.dumps(content, indent=1))
    return folder


@contextmanager
def staged_on_disk(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which replaces `folder` once its files are on the disk.

    Raises EnvironmentProblem as `write_checkpoint` does.
    """
    with disk_problems(folder), staged(folder, durable=True) as target:
        yield target


def remove_folder(folder: Path) -> None:
    """Remove `folder` atomically: rename it first, then delete it."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint | Damage:
    """Read a checkpoint onto the CPU, or say why it cannot be used; unpickles tensors only.

    Raises MemoryError if memory runs out, and OSError if no file can be opened: neither means damage.
    """
    try:
        return _read_checkpoint(folder)
    except FileNotFoundError as error:
        return Damage(folder, f"{Path(error.filename).name} is missing")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return Damage(folder, f"{STATE} was changed")
    except (OSError, pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        if system_errno(error) == errno.ENOMEM or (isinstance(error, MEMORY_ERRORS) and is_out_of_memory(error)):
            raise MemoryError(str(error)) from error
        if not isinstance(error, OSError):
            return Damage(folder, f"{OPTIMIZER} or {WEIGHTS} does not contain tensors")
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return Damage(folder, f"it cannot be read: {error.strerror}")


def _read_checkpoint(folder: Path) -> Checkpoint | Damage:
    content = json.loads(read_text_file(folder / STATE))
    digest = content.pop("sha256", None)  # missing in earlier versions
    if digest is not None and digest != hash_value(content):
        return Damage(folder, f"{STATE} was changed")
    for name, expected in content["files"].items():
        if hash_file(folder / name) != expected:
            return Damage(folder, f"{name} was changed")
    state = TypeAdapter(CheckpointState).validate_json(json.dumps(content), strict=True)["state"]
    if (named := _NAME.fullmatch(folder.name)) and int(named[1]) != state.step:
        return Damage(folder, f"{STATE} is of step {state.step}")
    optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    weights = load_file(folder / WEIGHTS) if WEIGHTS in content["files"] else {}
    return Checkpoint(folder, state, weights, optimizer, content["fingerprint"])


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    numbered_folders = [
        (int(match[1]), path) for path in checkpoints.glob("step-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(numbered_folders, reverse=True)]


def newest_checkpoint(checkpoints: Path, inputs: str, console: Console) -> Checkpoint | None:
    """Return the newest complete checkpoint.

    Damaged checkpoints are moved to `damaged-step-N`, those of other data or settings to `other-...`; both moves are
    printed. Afterwards no `step-N` is newer than the checkpoint that training resumes from.
    """
    for folder in list_checkpoints(checkpoints):
        checkpoint = read_checkpoint(folder)
        if isinstance(checkpoint, Damage):
            aside = _move(folder, checkpoints / f"damaged-{folder.name}")
            console.print(
                f"[yellow]Checkpoint {escape(str(folder))} is damaged ({checkpoint.reason}). Moved it to {aside.name}; "
                "using the one before it.[/]"
            )
            continue
        if checkpoint.inputs != inputs:
            _put_aside(checkpoints, checkpoint.inputs, console)
            return None
        return checkpoint
    return None


def rotate(checkpoints: Path, limit: int, best_step: int | None) -> None:
    """Keep the `limit` newest checkpoints and the best one; remove the others."""
    for folder in list_checkpoints(checkpoints)[limit:]:
        if folder.name != f"step-{best_step}":
            remove_folder(folder)


def remove_put_aside(checkpoints: Path, console: Console) -> None:
    """Remove checkpoints of other rows or settings, once this training has replaced their weights."""
    folders = sorted(checkpoints.glob("other-*"))
    if not folders:
        return
    names, total = ", ".join(folder.name for folder in folders), sum(map(measure_bytes, folders))
    with disk_problems(checkpoints):
        for folder in folders:
            remove_folder(folder)
    console.print(f"Removed {size(total)} of earlier checkpoints, which no training resumes from: {escape(names)}.")


def _put_aside(checkpoints: Path, inputs: str, console: Console) -> None:
    aside = checkpoints / f"other-{inputs[:8]}"
    with disk_problems(aside):
        aside.mkdir(exist_ok=True)
    metrics = checkpoints.parent / METRICS
    for path in ([metrics] if metrics.exists() else []) + list_checkpoints(checkpoints):
        _move(path, aside / path.name)
    console.print(
        f"[yellow]The checkpoints in {escape(str(checkpoints))} belong to other data or settings. Moved them to "
        f"{aside.name}; training starts at step 1.[/]"
    )


def _move(path: Path, target: Path) -> Path:
    """Rename a file or folder to `target`, replacing it."""
    with disk_problems(path):
        shutil.rmtree(target, ignore_errors=True)
        return path.rename(target)


@contextmanager
def disk_problems(folder: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into an EnvironmentProblem that names `folder`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else system_errno(error)
        if number is None:
            raise
        fix = "Use --out with a writable folder."
        if number in (errno.ENOSPC, errno.EDQUOT):
            existing = next((parent for parent in folder.parents if parent.exists()), Path("/"))
            fix = (
                f"{shutil.disk_usage(existing).free / 1e6:.0f} MB are free. Make room, lower train.save_total_limit, "
                "or choose another disk with --out. The same command then resumes from the last checkpoint."
            )
        what = f"{folder.name} could not be written: {os.strerror(number)}"
        raise EnvironmentProblem.of(what, str(folder), fix) from error
