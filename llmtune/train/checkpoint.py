"""Checkpoints, whole or not at all: written to another name, flushed to disk, hashed, then renamed.

A checkpoint is a folder `step-N` with `trainable.safetensors` (trainable weights by parameter name), `optimizer.pt`
(optimiser and schedule) and `state.json` (counters, and the sha256 of the other two).
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmtune.errors import EnvironmentProblem
from llmtune.store.atomic_files import hash_file
from llmtune.train.metrics_log import METRICS
from llmtune.train.train_state import TrainState

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"
STATE = "state.json"
_NAME = re.compile(r"step-([1-9][0-9]*)")
_UNFINISHED = (".tmp-", ".removed-")
_DISK_WORDS = (
    "code: 28",
    "storagefull",
    "no space left",
    "code: 122",
    "quota",
    "read-only file system",
    "permission denied",
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, read and found whole."""

    folder: Path
    state: TrainState
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint cannot be used."""

    folder: Path
    reason: str


def trainable_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters by name, on the CPU (there itself, not copied); tied ones once."""
    return {
        name: parameter.detach().to("cpu").contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights` into the trainable parameters of `model`, in place; the names must be the same."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parameters.keys() == weights.keys(), "a checkpoint holds exactly the trainable parameters"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    state: TrainState,
    fingerprint: str,
) -> Path:
    """Write the checkpoint `folder`, replacing one of the same name.

    Raises EnvironmentProblem if the disk is full or does not let us write; what was there before is then untouched.
    """

    def fill(place: Path) -> None:
        save_file(dict(weights), place / WEIGHTS)
        with (place / OPTIMIZER).open("wb") as file:
            torch.save(dict(optimizer), file)
        hashes = {name: hash_file(place / name) for name in (WEIGHTS, OPTIMIZER)}
        content = {"format": 1, "fingerprint": fingerprint, "files": hashes, "state": state.save()}
        (place / STATE).write_text(json.dumps(content, indent=1))

    write_folder(folder, fill)
    return folder


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder of another name, flush it to disk, and rename it to `folder`.

    Raises EnvironmentProblem as `write_checkpoint` does.
    """
    place = folder.with_name(f".tmp-{folder.name}")
    with _disk_problems(folder):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            fill(place)
            for file in sorted(place.rglob("*")):
                _flush(file)
            _flush(place)
            if folder.exists():
                remove_folder(folder)
            place.rename(folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        _flush(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove `folder` so that no half of it is ever seen under its name."""
    doomed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what an interrupted write or removal left behind in `folder`."""
    for left in folder.glob(".*"):
        if left.name.startswith(_UNFINISHED):
            shutil.rmtree(left, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint | Damage:
    """Read a checkpoint onto the CPU, or say why it cannot be used; nothing pickled beyond tensors is loaded."""
    try:
        content = json.loads((folder / STATE).read_text())
        for name, wanted in content["files"].items():
            if hash_file(folder / name) != wanted:
                return Damage(folder, f"{name} is not what was written")
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        weights = load_file(folder / WEIGHTS)
        return Checkpoint(folder, TrainState(**content["state"]), weights, optimizer, content["fingerprint"])
    except FileNotFoundError as error:
        return Damage(folder, f"{Path(error.filename).name} is missing")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return Damage(folder, f"{STATE} is not what was written")
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError):
        return Damage(folder, f"{OPTIMIZER} or {WEIGHTS} holds something else than tensors")
    except OSError as error:
        return Damage(folder, f"it cannot be read: {error.strerror}")


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    found = [(int(match[1]), path) for path in checkpoints.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(checkpoints: Path, fingerprint: str, console: Console) -> Checkpoint | None:
    """Return the newest checkpoint that is whole.

    A damaged one that is passed over is moved to `damaged-step-N`, those of other data or settings to `other-...`;
    both are said aloud. What then bears the name of a checkpoint is what training goes on from, or older.
    """
    for folder in list_checkpoints(checkpoints):
        found = read_checkpoint(folder)
        if isinstance(found, Damage):
            aside = _move(folder, checkpoints / f"damaged-{folder.name}")
            console.print(
                f"[yellow]Checkpoint {escape(str(folder))} is damaged ({found.reason}); it is moved to {aside.name}, "
                "and the one before it is used.[/]"
            )
            continue
        if found.fingerprint != fingerprint:
            _put_aside(checkpoints, found.fingerprint, console)
            return None
        return found
    return None


def rotate(checkpoints: Path, limit: int, best_step: int | None) -> None:
    """Keep the `limit` newest checkpoints and the best one; remove the others."""
    for folder in list_checkpoints(checkpoints)[limit:]:
        if folder.name != f"step-{best_step}":
            remove_folder(folder)


def _put_aside(checkpoints: Path, fingerprint: str, console: Console) -> None:
    aside = checkpoints / f"other-{fingerprint[:8]}"
    with _disk_problems(aside):
        aside.mkdir(exist_ok=True)
    metrics = checkpoints.parent / METRICS
    for path in ([metrics] if metrics.exists() else []) + list_checkpoints(checkpoints):
        _move(path, aside / path.name)
    console.print(
        f"[yellow]The checkpoints in {escape(str(checkpoints))} belong to other data or settings: they are moved to "
        f"{aside.name}, and training starts at step 1.[/]"
    )


def _move(path: Path, place: Path) -> Path:
    """Rename a file or folder to `place`, which is replaced."""
    with _disk_problems(path):
        shutil.rmtree(place, ignore_errors=True)
        return path.rename(place)


def _flush(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_problems(folder: Path) -> Iterator[None]:
    """Turn what a full or forbidden disk raises into an EnvironmentProblem that names `folder`."""
    try:
        yield
    except OSError as error:
        raise _disk_problem(folder, error.errno, error.strerror or str(error)) from error
    except (SafetensorError, RuntimeError) as error:
        # safetensors and torch's zip writer hide the system's error in their text.
        full = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
        if not full and not any(words in str(error).lower() for words in _DISK_WORDS):
            raise
        known = errno.EACCES if "denied" in str(error).lower() else errno.ENOSPC
        raise _disk_problem(folder, known, os.strerror(known)) from error


def _disk_problem(folder: Path, number: int | None, reason: str) -> EnvironmentProblem:
    fix = "Give the run a folder that can be written with --out."
    if number in (errno.ENOSPC, errno.EDQUOT):
        place = next((parent for parent in folder.parents if parent.exists()), Path("/"))
        free = shutil.disk_usage(place).free
        fix = (
            f"{free / 1e6:.0f} MB are free. Make room, lower train.save_total_limit, or choose another disk with "
            "--out; the same command then goes on from the last checkpoint."
        )
    problem = EnvironmentProblem.of(f"{folder.name} could not be written: {reason}", str(folder), fix)
    assert isinstance(problem, EnvironmentProblem)
    return problem
