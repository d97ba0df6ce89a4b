"""Losses and gradients of one step: micro-batches within a token budget, normalised by the token count of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.tensor import DTensor

from llmtune.adapter.reference_model import own_part
from llmtune.data.examples import ExampleReader
from llmtune.errors import TrainingError
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.device import fits_in_memory, release_memory
from llmtune.records import Batch, Loss
from llmtune.train.batch_plan import Indexes, divide, micro_batches
from llmtune.train.distributed import any_process, sum_over_processes
from llmtune.train.objective import StepRows
from llmtune.train.setup import TrainContext

T = TypeVar("T")


class MicroBatchTooLarge(Exception):
    """A micro-batch ran out of memory in some process; all processes raise this together, unless `alone`."""

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.alone = alone
        """Whether the other processes wait for this one; then only a restart helps."""


@dataclass(frozen=True)
class StepLoss:
    """Loss and gradient statistics of one step, over all processes."""

    mean: float
    """Nats per supervised token."""
    sum: float
    count: int
    tokens: int
    grad_norm: float
    """Norm of the gradient before clipping."""
    suspects: Indexes
    """Training examples of this process whose micro-batch had a non-finite loss."""
    rows: Indexes
    """The training examples of the step."""
    row_sums: npt.NDArray[np.float64]
    """Loss sum of each row; NaN if the task's loss does not decompose by row."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.mean) and math.isfinite(self.grad_norm)


class ValidationStopped(Exception):
    """A validation ended because training stops; all processes raise this together."""


@dataclass(frozen=True)
class MicroBatches(StepRows):
    """The rows of a step, or all validation rows, with this process's micro-batches."""

    training: TrainContext
    groups: list[Indexes]
    """Rows of each micro-batch of this process."""
    real: int
    """How many of the groups count. Others have weight zero: every process needs one, and under sharding all run the
    same number."""
    most: int
    """The largest number of groups of a process."""
    stop: Callable[[], bool] | None = None
    """Asked after each micro-batch whether to raise ValidationStopped, in all processes together."""

    @property
    def divided(self) -> bool:
        """Whether the rows are in several micro-batches or processes."""
        return len(self.groups) > 1 or self.accelerator.num_processes > 1

    def run(self, work: Callable[[torch.nn.Module, Batch, Indexes], T]) -> list[T]:
        """Do `work` on each micro-batch, without gradients; return the results that count."""
        training, results, fits = self.training, list[T](), True

        def attempt(rows: Indexes) -> None:
            batch = make_batch(training, self.reader, rows, self.number)
            with torch.no_grad(), training.compute():
                results.append(work(training.adapted.model, batch, rows))

        for index in range(self.most):
            if self.number:
                seed_micro_batch(training, self.number, index)
            if index < len(self.groups):
                fits = fits and try_memory(training, partial(attempt, self.groups[index]))
            if self.stop is not None or index == self.most - 1:
                stops = self.stop is not None and self.stop()
                stopped, failed = sum_over_processes(self.accelerator, [float(stops), float(not fits)])
                if failed:
                    raise MicroBatchTooLarge
                if stopped:
                    raise ValidationStopped
        return results[: self.real]


def step_gradients(training: TrainContext, step: int, budget: int, loss_scale: float) -> StepLoss:
    """Leave the clipped gradient of `step` in the parameters, independent of `budget` and the number of processes.

    Each micro-batch's summed loss is divided by the count expected for the step, which keeps gradients in the range of
    16-bit formats. Accelerate averages over processes, so the loss is multiplied by their number. If the true count
    turns out to differ, the gradient is rescaled at the end.

    Raises:
        MicroBatchTooLarge: memory ran out; gradients are then undefined.
    """
    accelerator, lengths = training.accelerator, training.examples.lengths
    rows = training.plan.rows(step)
    expected = max(1, int(training.examples.supervised[rows].sum()))
    scale = loss_scale * accelerator.num_processes / expected
    batches = cut_rows(training, training.examples, rows, budget, step)
    groups, real = batches.groups, batches.real
    losses: list[Loss] = []
    training.objective.prepare(batches)
    if training.objective.idle:
        nothing, tokens = np.empty(0, dtype=np.int64), int(lengths[rows].sum())
        return StepLoss(0.0, 0.0, expected, tokens, 0.0, nothing, rows, np.full(len(rows), math.nan))

    def attempt(index: int) -> bool:
        seed_micro_batch(training, step, index)
        weight = scale if index < real else 0.0
        return try_memory(training, lambda: losses.append(_backward_pass(training, groups[index], weight, step)))

    fits = True
    with accelerator.no_sync(training.model):
        for index in range(len(groups) - 1):
            fits = fits and attempt(index)
    if any_process(accelerator, not fits):
        raise MicroBatchTooLarge
    fits = attempt(len(groups) - 1)  # the lightest; gradients are synchronised here
    if not fits and accelerator.num_processes > 1:
        raise TrainingError.of(
            f"out of memory in step {step} while processes were exchanging gradients",
            f"process {accelerator.process_index}",
            "Run the same command again: it resumes from the last checkpoint with smaller micro-batches.",
        )
    if not fits:
        raise MicroBatchTooLarge
    sums = [float(loss.sum) for loss in losses[:real]]
    local_sums = _own_row_sums(rows, groups[:real], losses[:real])
    counted = float(sum(loss.count for loss in losses[:real]))
    total, count, *row_sums = sum_over_processes(accelerator, [sum(sums), counted, *local_sums])
    count = max(1, int(count))
    norm = _finish_gradients(training, expected / (count * loss_scale))
    bad = [group for group, value in zip(groups, sums, strict=False) if not math.isfinite(value)]
    return StepLoss(
        mean=total / count,
        sum=total,
        count=count,
        tokens=int(lengths[rows].sum()),
        grad_norm=norm,
        suspects=np.concatenate([np.empty(0, dtype=np.int64), *bad]),
        rows=rows,
        row_sums=np.asarray(row_sums, dtype=np.float64),
    )


def _own_row_sums(rows: Indexes, groups: Sequence[Indexes], losses: Sequence[Loss]) -> list[float]:
    """Return this process's share of each row's loss in a step; NaN if rows have no loss of their own."""
    place = {int(row): at for at, row in enumerate(rows)}
    sums = [0.0] * len(rows)
    for group, loss in zip(groups, losses, strict=True):
        values = [math.nan] * len(group) if loss.row_sums is None else loss.row_sums.tolist()
        for row, value in zip(group.tolist(), values, strict=True):
            sums[place[row]] += value
    return sums


def validation_loss(training: TrainContext, budget: int, stop: Callable[[], bool] = lambda: False) -> float | None:
    """Return the loss over all validation examples, in nats per supervised token; None if `stop` returned true.

    Raises:
        MicroBatchTooLarge: memory ran out.
    """
    reader = training.validation
    assert reader is not None, "there are validation examples"
    training.model.eval()
    try:
        blocks = cut_rows(training, reader, np.arange(len(reader)), budget, 0)
        return training.objective.validate(replace(blocks, stop=stop))
    except ValidationStopped:
        return None
    finally:
        training.model.train()


def try_memory(training: TrainContext, work: Callable[[], object]) -> bool:
    """Do `work`; if it runs out of memory, drop gradients, release memory and return False.

    Raises MicroBatchTooLarge if the model is sharded: the others then wait for this process in the middle of a layer.
    """
    if fits_in_memory(work):
        return True
    if training.sharded:
        raise MicroBatchTooLarge(alone=True)
    training.optimizer.zero_grad(set_to_none=True)
    release_memory()
    return False


def seed_micro_batch(training: TrainContext, step: int, index: int) -> None:
    """Seed dropout for a micro-batch of this process from the seed and the step; a resumed run draws the same masks."""
    words = (training.recipe.seed % 2**64, step, index, training.accelerator.process_index)
    seed = np.random.SeedSequence(words)
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
    np.random.seed(int(seed.generate_state(2, np.uint32)[1]))  # SpecAugment draws from it


def make_batch(training: TrainContext, reader: ExampleReader, rows: Indexes, draw: int = 0) -> Batch:
    """Collate examples and move their tensors to the device; `draw` is the step, which seeds random masks."""
    return move_to(training.device, training.collate([reader[int(row)] for row in rows], draw))


def find_guilty_rows(training: TrainContext, suspects: Sequence[int]) -> list[int]:
    """Return the `suspects` whose own loss, in evaluation mode, is not finite; all of them if none is found.

    All processes check the same rows, as a sharded model needs.
    """
    guilty = []
    training.model.eval()
    with torch.no_grad(), training.compute():
        for row in suspects:
            batch = make_batch(training, training.examples, np.asarray([row]))
            if not math.isfinite(float(training.objective.complete_loss(training.adapted.model, batch).sum)):
                guilty.append(row)
    training.model.train()
    return guilty or [*suspects]


def cut_rows(training: TrainContext, reader: ExampleReader, rows: Indexes, budget: int, number: int) -> MicroBatches:
    """Divide rows over the processes, and cut this one's share into micro-batches within the token budget."""
    accelerator, lengths = training.accelerator, reader.lengths
    shares = divide(rows, lengths, accelerator.num_processes)
    cut = [micro_batches(share, lengths, budget, training.packed, training.pass_tokens) for share in shares]
    groups, most = cut[accelerator.process_index], max(map(len, cut))
    idle = [rows[[int(lengths[rows].argmin())]]]
    padded = groups + idle * ((most if training.sharded else 1) - len(groups))
    size = training.recipe.train.batch_size
    return MicroBatches(number, rows, reader, accelerator, size, training, padded, len(groups), most)


def _backward_pass(training: TrainContext, rows: Indexes, weight: float, step: int) -> Loss:
    batch = make_batch(training, training.examples, rows, step)
    with training.compute():
        loss = training.objective.loss(training.model, batch, rows)
    training.accelerator.backward(loss.sum * weight)
    return Loss(loss.sum.detach(), loss.count, row_sums=loss.row_sums)


def _finish_gradients(training: TrainContext, factor: float) -> float:
    """Multiply the gradients by `factor`, clip them in place, and return their norm before clipping."""
    if factor != 1:
        for parameter in training.parameters:
            if parameter.grad is not None:
                own_part(parameter.grad).mul_(factor)
    norm = training.accelerator.clip_grad_norm_(training.parameters, training.recipe.train.max_grad_norm or math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
