"""A teacher's predictions for each learned token: recorded once before training, and read by the loss.

They are in files of `BLOCK` examples each, written atomically. A killed recording continues after the last file, and
the files do not depend on the number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn
from transformers import PreTrainedTokenizerBase

from llmtune import __version__
from llmtune.data.examples import ExampleReader
from llmtune.data.row_store import iterate_texts
from llmtune.display.console import progress_bars
from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model.resolve import resolve_model
from llmtune.model.teacher_loss import Distribution
from llmtune.recipe.distil_section import DistilSection
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Examples, Json, Loss, ModelRef, Rows
from llmtune.store.atomic_files import atomic_file, hash_folder, hash_value, read_json, remove_unfinished, write_json
from llmtune.store.run_folder import MANIFEST, read_run, recipe_of_run, trained_name
from llmtune.store.run_lock import LOCK, Pins, check_pin, read_pins
from llmtune.train.batch_plan import Indexes
from llmtune.train.objective import ComputeLoss, StepObjective, StepRows, SummedLoss, TrainedTask

FOLDER = "teacher"
"""In the folder `data` of the run."""
RECORD = "teacher.json"
BLOCK = 256
"""Examples in a file: a killed recording loses at most the work on one."""
OPEN_BLOCKS = 64
PROBED_ROWS = 64
LEARNED = ("train", "validation")
"""Splits whose predictions are recorded."""
KEY = "distil.teacher"
Records = npt.NDArray[np.void]
"""One record of `record_format` for each prediction."""


def record_format(top_k: int) -> np.dtype[Any]:
    """Return the format of a prediction: the likeliest tokens, and log-probabilities of them and of the rest."""
    return np.dtype([("ids", "<i4", (top_k,)), ("logs", "<f2", (top_k + 1,))])


def plan_bytes(task: TrainedTask, recipe: Recipe, examples: Examples) -> int:
    """Return the bytes that the predictions of the recipe's teacher will take."""
    count, labels = count_predictions(examples), len(task.output_labels(recipe))
    if task.predicts_tokens:
        return count * record_format(recipe.distil.top_k if recipe.distil else 0).itemsize
    each = (
        labels * record_format(2).itemsize if task.output_kind(recipe) == "yes-no" else record_format(labels).itemsize
    )
    return count * each


def count_predictions(examples: Examples) -> int:
    """Return the number of learned tokens, or texts with classes, whose predictions are recorded."""
    return sum(examples.supervised.get(split, 0) for split in LEARNED)


# The teacher


def is_run(teacher: str) -> bool:
    """Return whether a teacher is a run folder."""
    return (Path(teacher) / MANIFEST).is_file()


def find_teacher(recipe: Recipe, console: Console, offline: bool, pins: Pins | None = None) -> ModelRef | None:
    """Return the teacher of a recipe, by its files; None without one.

    Raises RecipeError or EnvironmentProblem if it is missing, not trained, cannot be downloaded, or differs from
    `pins`.
    """
    if recipe.distil is None:
        return None
    teacher = _find_files(recipe.distil.teacher, recipe, console, offline)
    if pins is not None and pins.teacher_hash is not None:
        check_pin("the teacher's content", pins.teacher_hash, teacher.content_hash)
    return teacher


def _find_files(name: str, recipe: Recipe, console: Console, offline: bool) -> ModelRef:
    if is_run(name):
        folder = read_run(Path(name))
        folder.require_trained()
        trained = folder.path / trained_name(recipe_of_run(folder).recipe)
        content = hash_value([read_pins(folder.path / LOCK).model_hash, hash_folder(trained)])
        return ModelRef(name, trained, None, content)
    try:
        return resolve_model(name, recipe.model.model_copy(update={"revision": "main"}), console, offline)
    except LlmtuneError as error:
        problems = (replace(one, where=KEY if one.where == "model.name" else one.where) for one in error.problems)
        raise type(error)(*problems) from error


def teacher_inputs(recipe: Recipe, examples: Examples, teacher: ModelRef | None) -> str | None:
    """Hash what the recorded predictions depend on; None without a teacher."""
    if recipe.distil is None or teacher is None:
        return None
    settings = [recipe.distil.top_k, recipe.distil.temperature, recipe.model.dtype, recipe.model.attn_implementation]
    return hash_value([__version__, examples.content_hash, teacher.content_hash, settings])


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, rows: Rows, name: str) -> None:
    """Raise RecipeError if the tokenizers differ, in their vocabularies or on the first rows."""
    ours, theirs = ({token: text for text, token in one.get_vocab().items()} for one in (student, teacher))
    fix = "Name a teacher of the same family, with the same tokenizer."
    different = next(
        (token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)), None
    )
    if different is not None:
        what = f"{name} has another tokenizer: id {different} is {theirs.get(different)!r}, and {ours.get(different)!r}"
        raise RecipeError.of(f"{what} in the student's", KEY, fix)
    for origin, text in islice(iterate_texts(rows, "train"), PROBED_ROWS):
        if student(text)["input_ids"] != teacher(text)["input_ids"]:
            raise RecipeError.of(f"{name} has another tokenizer: it cuts the row {origin} differently", KEY, fix)


# Recording


def record_teacher(
    readers: Mapping[str, ExampleReader],
    record: Callable[[ExampleReader, Sequence[int]], Records],
    folder: Path,
    console: Console,
    *,
    device: str,
    packed: bool,
    share: tuple[int, int] = (0, 1),
    writes: bool = True,
) -> None:
    """Write the predictions for all examples to `folder`, except for those that it already has.

    `record` returns the predictions for a batch of examples, in their order. `share` is this process's number and the
    count of those that divide the blocks. One that does not write only runs the model.

    Raises EnvironmentProblem if an example does not fit into memory; an OSError if the disk is full.
    """
    with progress_bars(console, MofNCompleteColumn()) as progress:
        bar = progress.add_task("teach", total=sum(map(len, readers.values())))
        for split, reader in readers.items():
            for number, rows in enumerate(_blocks(len(reader))):
                path = _block_file(folder, split, number)
                if not path.exists() and number % share[1] == share[0]:
                    records = _record_block(reader, rows, record, device, packed)
                    if writes:
                        with atomic_file(path) as temporary, temporary.open("wb") as file:
                            np.save(file, records)
                            file.flush()
                            os.fsync(file.fileno())
                progress.advance(bar, len(rows))


def begin_recording(folder: Path, inputs: str, needed: int, *, restart: bool) -> None:
    """Prepare a folder for predictions with these inputs, without those of others; with `restart`, without any.

    Raises EnvironmentProblem if the disk has less space than is `needed`.
    """
    if restart or read_json(folder / RECORD) != {"inputs": inputs}:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    write_json(folder / RECORD, {"inputs": inputs})
    left = needed - sum(path.stat().st_size for path in folder.iterdir())
    if left > (free := shutil.disk_usage(folder).free):
        what = f"the teacher's predictions need {left / 1e6:,.0f} MB more, but the disk has {free / 1e6:,.0f} MB free"
        raise EnvironmentProblem.of(what, str(folder), "Free space, or lower distil.top_k.")


def _record_block(
    reader: ExampleReader,
    rows: range,
    record: Callable[[ExampleReader, Sequence[int]], Records],
    device: str,
    packed: bool,
) -> Records:
    def work(batch: list[int]) -> list[Records]:
        chosen = [rows[i] for i in batch]
        records, counts = record(reader, chosen), reader.supervised[chosen].astype(np.int64)
        return np.split(records, np.cumsum(counts)[:-1] * _outputs(records, counts))

    lengths = reader.lengths[rows.start : rows.stop].tolist()
    return np.concatenate(run_in_batches(lengths, budget_for(device, TOKEN_BUDGET), work, packed=packed))


def _outputs(records: Records, counts: npt.NDArray[np.int64]) -> int:
    """Return the outputs of a prediction: several if a text may have several classes."""
    each, rest = divmod(len(records), max(1, int(counts.sum())))
    assert not rest, "each prediction has the same number of outputs"
    return each


def _blocks(count: int) -> Iterator[range]:
    return (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _block_file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05}.npy"


def to_records(ids_SK: torch.Tensor, logs_SL: torch.Tensor) -> Records:
    """Return predictions as they are stored."""
    records = np.empty(len(ids_SK), dtype=record_format(ids_SK.shape[1]))
    records["ids"], records["logs"] = ids_SK.cpu().numpy(), logs_SL.cpu().numpy()
    return records


# Reading


class TeacherReader:
    """Reads the predictions for examples of a split."""

    def __init__(self, folder: Path, split: str, reader: ExampleReader) -> None:
        self.folder, self.split = folder, split
        self.supervised = reader.supervised.astype(np.int64)
        self._open = lru_cache(OPEN_BLOCKS)(self._open_block)

    def read(self, rows: Indexes) -> Records:
        """Return the predictions of examples, in their order."""
        parts = []
        for row in rows.tolist():
            records, starts = self._open(row // BLOCK)
            parts.append(records[starts[row % BLOCK] : starts[row % BLOCK + 1]])
        return np.concatenate(parts)

    def _open_block(self, number: int) -> tuple[Records, list[int]]:
        path = _block_file(self.folder, self.split, number)
        counts = self.supervised[number * BLOCK : (number + 1) * BLOCK]
        try:
            records = np.load(path, mmap_mode="r")
            starts = np.concatenate([[0], np.cumsum(counts)]) * _outputs(records, counts)
        except (OSError, ValueError, AssertionError) as error:
            fix = "Run the same command again: it records them again."
            raise EnvironmentProblem.of("the teacher's predictions are missing or damaged", str(path), fix) from error
        return records, starts.tolist()


class Distilled(SummedLoss):
    """The losses compare the student's predictions with those of the teacher."""

    def __init__(self, compute: ComputeLoss, section: DistilSection, readers: Mapping[str, TeacherReader]) -> None:
        super().__init__(compute)
        self.section, self.readers, self.split = section, readers, LEARNED[0]

    def loss(self, model: torch.nn.Module, batch: Batch, rows: Indexes) -> Loss:
        """Return the task's loss, measured by the teacher's predictions."""
        records, device = self.readers[self.split].read(rows), batch["input_ids"].device
        logs_SL = torch.from_numpy(records["logs"].astype(np.float32)).log_softmax(1)  # their rounded sum is not 1
        teacher = Distribution(
            torch.from_numpy(records["ids"].astype(np.int64)).to(device),
            logs_SL.to(device),
            self.section.weight,
            self.section.temperature,
        )
        return self.compute(model, {**batch, "teacher": teacher})

    def validate(self, blocks: StepRows) -> float:
        """Return the mean of the same loss over the validation rows."""
        self.split = LEARNED[1]
        try:
            return super().validate(blocks)
        finally:
            self.split = LEARNED[0]


def choose_objective(
    task: TrainedTask, recipe: Recipe, examples: Examples, readers: Mapping[str, ExampleReader | None]
) -> StepObjective:
    """Return the objective of a task, or one that learns from the teacher's recorded predictions."""
    if recipe.distil is None:
        return task.objective(recipe)
    folder = examples.folder.with_name(FOLDER)
    stored = {split: TeacherReader(folder, split, reader) for split, reader in readers.items() if reader is not None}
    return Distilled(task.loss, recipe.distil, stored)


def recorded_facts(folder: Path, section: DistilSection, examples: Examples) -> Json:
    """Return the facts of recorded predictions for the manifest."""
    size = sum(path.stat().st_size for path in folder.glob("*.npy"))
    return {"teacher": section.teacher, "predictions": count_predictions(examples), "bytes": size}
