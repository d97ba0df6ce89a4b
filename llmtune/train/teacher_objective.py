"""The loss against a teacher's recorded predictions, read back by example."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from llmtune.data.examples import ExampleReader
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.teacher import BLOCK, FOLDER, LEARNED, Records, block_file, count_outputs, is_intact
from llmtune.model.teacher_loss import Distribution
from llmtune.recipe.distil_section import DistilSection
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Examples, Loss
from llmtune.store.atomic_files import read_once
from llmtune.train.batch_plan import Indexes
from llmtune.train.objective import ComputeLoss, StepObjective, StepRows, SummedLoss, TrainedTask

OPEN_BLOCKS = 64
"""Files that are open at a time."""


class TeacherReader:
    """Reads the predictions for examples of a split."""

    def __init__(self, folder: Path, split: str, reader: ExampleReader) -> None:
        self.folder, self.split = folder, split
        self.supervised = reader.supervised.astype(np.int64)
        self._open = lru_cache(OPEN_BLOCKS)(self._open_block)

    def read(self, rows: Indexes) -> Records:
        """Return the predictions of examples, in their order."""
        blocks = [(*self._open(row // BLOCK), row % BLOCK) for row in rows.tolist()]
        return np.concatenate([records[starts[i] : starts[i + 1]] for records, starts, i in blocks])

    def _open_block(self, number: int) -> tuple[Records, list[int]]:
        path = block_file(self.folder, self.split, number)
        counts = self.supervised[number * BLOCK : (number + 1) * BLOCK]
        try:
            if not read_once(path, is_intact):
                raise ValueError("its hash differs")
            records = np.load(path, mmap_mode="r")
            starts = np.concatenate([[0], np.cumsum(counts)]) * count_outputs(records, counts)
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
    if recipe.distil is None or not recipe.distil.weight:
        return task.objective(recipe)
    folder = examples.folder.with_name(FOLDER)
    stored = {split: TeacherReader(folder, split, reader) for split, reader in readers.items() if reader is not None}
    return Distilled(task.loss, recipe.distil, stored)
