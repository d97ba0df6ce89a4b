"""How the loss of a step is made of its micro-batches: summed, from statistics of the step, or from cached features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator

from llmtune.data.example import AnyExample
from llmtune.data.examples import ExampleReader
from llmtune.errors import TrainingError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.model.device import fits_in_memory
from llmtune.records import Batch, Loss
from llmtune.train.batch_plan import Indexes
from llmtune.train.distributed import gather_lists, sum_over_processes

if TYPE_CHECKING:
    from llmtune.errors import Problem
    from llmtune.recipe.schema import Recipe

T = TypeVar("T")
ComputeLoss = Callable[[torch.nn.Module, Batch], Loss]
"""A task's loss of a micro-batch."""


@dataclass(frozen=True)
class StepRows:
    """The rows of one step in all processes, or all validation rows."""

    number: int
    """The step, counted from 1; 0 for validation rows."""
    rows: Indexes
    reader: ExampleReader
    accelerator: Accelerator
    batch_size: int
    """`train.batch_size`."""
    training: Any
    """The `llmtune.train.setup.TrainContext`, which contains the objective."""

    @property
    def divided(self) -> bool:
        """Whether the rows are in several micro-batches or processes."""
        raise NotImplementedError

    def run(self, work: Callable[[torch.nn.Module, Batch, Indexes], T]) -> list[T]:
        """Do `work` on each of this process's micro-batches, without gradients; all processes must call this.

        In a step the model is in training mode, with the random numbers of the passes that leave gradients.
        Raises MicroBatchTooLarge in all processes if memory ran out in one.
        """
        raise NotImplementedError


class StepObjective:
    """How the loss of a step is made of its micro-batches. It belongs to one training, and keeps the step's state."""

    measures_start: bool = False
    """Whether training begins with a validation, to see how `metrics` change."""

    def __init__(self, compute: ComputeLoss) -> None:
        self.compute = compute
        """The task's loss of a micro-batch."""
        self.metrics: dict[str, float] = {}
        """Metrics of the last validation, in addition to the loss."""
        self.figures: dict[str, float] = {}
        """Figures of the prepared step, in addition to the loss."""
        self.idle: Problem | None = None
        """Why the prepared step has no gradient; None if it has one. Without a gradient, no optimiser step is taken."""

    def prepare(self, step: StepRows) -> None:
        """Compute what the losses of the micro-batches need from the complete step."""

    def loss(self, model: torch.nn.Module, batch: Batch, rows: Indexes) -> Loss:
        """Return the share of a micro-batch in the loss of the prepared step; its gradient trains the model."""
        raise NotImplementedError

    def complete_loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Return the loss of a micro-batch as if it were a complete step."""
        return self.compute(model, batch)

    def validate(self, blocks: StepRows) -> float:
        """Return the mean loss of the validation rows."""
        raise NotImplementedError


class SummedLoss(StepObjective):
    """The losses of the micro-batches are added up."""

    def loss(self, model: torch.nn.Module, batch: Batch, rows: Indexes) -> Loss:
        """Return the task's loss."""
        return self.compute(model, batch)

    def validate(self, blocks: StepRows) -> float:
        """Divide the sum over all rows by their count."""

        def measure(model: torch.nn.Module, batch: Batch, rows: Indexes) -> tuple[float, int]:
            loss = self.loss(model, batch, rows)
            return float(loss.sum), loss.count

        sums = [sum(column) for column in zip(*blocks.run(measure), strict=True)] or [0.0, 0.0]
        total, count = sum_over_processes(blocks.accelerator, sums)
        return total / max(1, count)


class SharedStatistics(SummedLoss):
    """The losses need sums over the complete step, computed without gradients, as `totals` in their batches."""

    def __init__(self, compute: ComputeLoss, measure: Callable[[torch.nn.Module, Batch], list[float]]) -> None:
        super().__init__(compute)
        self.measure = measure
        """Return the statistics of a micro-batch."""
        self.totals = [0.0, 0.0]

    def prepare(self, step: StepRows) -> None:
        """Sum the statistics over all micro-batches and processes."""
        measured = step.run(lambda model, batch, rows: self.measure(model, batch))
        sums = [sum(column) for column in zip(*measured, strict=True)] or [0.0, 0.0]
        self.totals = sum_over_processes(step.accelerator, sums)

    def loss(self, model: torch.nn.Module, batch: Batch, rows: Indexes) -> Loss:
        """Return the task's loss with the totals of the step."""
        return self.compute(model, {**batch, "totals": self.totals})

    def complete_loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Return the loss with the statistics of the batch alone."""
        with torch.no_grad():
            totals = self.measure(model, batch)
        return self.compute(model, {**batch, "totals": totals})

    def validate(self, blocks: StepRows) -> float:
        """Measure all rows as one step."""
        self.prepare(blocks)
        return super().validate(blocks)


class CachedFeatures(StepObjective):
    """The loss compares all rows of a step by their features, in the memory of one micro-batch.

    First the features of all rows are computed without a graph, and the gradient of the loss in them. The backward
    passes then send it into the model, one micro-batch at a time: Gao et al., "Scaling Deep Contrastive Learning Batch
    Size under Memory Limited Setup", 2021.
    """

    measures_start = True

    def __init__(
        self,
        compute: ComputeLoss,
        read: Callable[[torch.nn.Module, Batch], list[torch.Tensor]],
        compare: Callable[[Sequence[torch.Tensor], Sequence[AnyExample]], Loss],
        describe: Callable[[Sequence[torch.Tensor]], dict[str, float]],
    ) -> None:
        super().__init__(compute)
        self.read = read
        """Return the features of each example in a micro-batch, in float32."""
        self.compare = compare
        """Return the loss of a complete step from the features of its examples."""
        self.describe = describe
        """Return metrics of the features of all validation rows."""
        self.step_loss: Loss | None = None
        """The loss of the prepared step; None if it is a single micro-batch, which needs no cache."""
        self.gradients: dict[int, torch.Tensor] = {}
        """The gradient of the loss in the features of each training example."""

    def prepare(self, step: StepRows) -> None:
        """Compute the loss of the step and its gradient in the features.

        Raises TrainingError if memory ran out in the comparison: smaller micro-batches would not help.
        """
        self.step_loss, self.gradients = None, {}
        if not step.divided:
            return
        features = self._read_all(step)
        leaves = [features[int(row)].requires_grad_() for row in step.rows]
        compared: list[tuple[Loss, tuple[torch.Tensor, ...]]] = []

        def compare() -> None:
            loss = self.compare(leaves, [step.reader[int(row)] for row in step.rows])
            compared.append((loss, torch.autograd.grad(loss.sum, leaves)))

        if not fits_in_memory(compare):
            what = f"out of memory in the loss of step {step.number}, which compares all of its {len(leaves):,} rows"
            raise TrainingError.of(what, "train.batch_size", "Lower it, or give rows fewer negatives.")
        ((loss, gradients),) = compared
        row_sums = None if loss.row_sums is None else loss.row_sums.detach()
        self.step_loss = Loss(loss.sum.detach(), loss.count, row_sums=row_sums)
        self.gradients = dict(zip(step.rows.tolist(), gradients, strict=True))

    def loss(self, model: torch.nn.Module, batch: Batch, rows: Indexes) -> Loss:
        """Return the share of some rows, with the gradient that the features got from the loss of the step."""
        if self.step_loss is None:
            return self.compute(model, batch)
        pairs = zip(rows.tolist(), self.read(model, batch), strict=True)
        surrogate = torch.stack([(features * self.gradients[row]).sum() for row, features in pairs]).sum()
        places = {row: place for place, row in enumerate(self.gradients)}
        chosen = [places[row] for row in rows.tolist()]
        row_sums = self.step_loss.row_sums
        if row_sums is None:
            share = self.step_loss.sum * len(chosen) / len(places)
        else:
            row_sums = row_sums[chosen]
            share = row_sums.sum()
        # the value of the share, with the gradient of the surrogate
        return Loss(share + (surrogate - surrogate.detach()), len(chosen), row_sums=row_sums)

    def validate(self, blocks: StepRows) -> float:
        """Return the mean loss over blocks of `batch_size` rows in order, as if each were a step."""
        features, count, size = self._read_all(blocks), len(blocks.rows), blocks.batch_size
        self.metrics = self.describe([features[row] for row in range(count)])
        cut = [range(start, min(start + size, count)) for start in range(0, count, size)]
        losses = [self.compare([features[i] for i in rows], [blocks.reader[i] for i in rows]) for rows in cut]
        return sum(float(loss.sum) for loss in losses) / sum(loss.count for loss in losses)

    def _read_all(self, step: StepRows) -> dict[int, torch.Tensor]:
        """Return the features of the rows of all processes."""
        pairs = step.run(lambda model, batch, rows: [*zip(rows.tolist(), self.read(model, batch), strict=True)])
        local_pairs, accelerator = [pair for part in pairs for pair in part], step.accelerator
        if accelerator.num_processes == 1:
            return dict(local_pairs)
        gathered = gather_lists(accelerator, [(row, features.cpu()) for row, features in local_pairs])
        return {row: features.to(accelerator.device) for row, features in gathered}


class TrainedTask(EvaluatedTask):
    """A task that is trained."""

    def objective(self, recipe: Recipe) -> StepObjective:
        """Return how the loss of a step is made of micro-batches."""
        return SummedLoss(self.loss)
