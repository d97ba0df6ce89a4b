"""Losses and gradients of one step: micro-batches within a token budget, normalised by the token count of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
from llmtune.train.distributed import any_process, gather_lists, sum_over_processes
from llmtune.train.setup import TrainContext


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


@dataclass(frozen=True)
class StepFeatures:
    """The loss of a step, and its gradient in the features of each row."""

    loss: Loss
    gradients: dict[int, torch.Tensor]
    """By training example."""

    def loss_of(self, rows: Indexes) -> Loss:
        """Return the share of some rows in the loss."""
        places = {row: at for at, row in enumerate(self.gradients)}
        own = [places[int(row)] for row in rows]
        if self.loss.row_sums is None:
            return Loss(self.loss.sum * len(own) / len(places), len(own))
        return Loss(self.loss.row_sums[own].sum(), len(own), row_sums=self.loss.row_sums[own])


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
    groups, real = _own_groups(training, rows, budget)
    losses: list[Loss] = []
    totals = _sum_step_statistics(training, training.examples, groups, real, step)
    divided = len(groups) > 1 or accelerator.num_processes > 1
    caches = training.task.has_step_loss and divided
    cached = _cache_gradients(training, rows, groups, real, step) if caches else None

    def attempt(index: int) -> bool:
        seed_micro_batch(training, step, index)
        weight = scale if index < real else 0.0
        work = partial(_backward_pass, training, groups[index], weight, step, totals, cached)
        return try_memory(training, lambda: losses.append(work()))

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
    own = _own_row_sums(rows, groups[:real], losses[:real])
    counted = float(sum(loss.count for loss in losses[:real]))
    total, count, *row_sums = sum_over_processes(accelerator, [sum(sums), counted, *own])
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
    own = [0.0] * len(rows)
    for group, loss in zip(groups, losses, strict=True):
        values = [math.nan] * len(group) if loss.row_sums is None else loss.row_sums.tolist()
        for row, value in zip(group.tolist(), values, strict=True):
            own[place[row]] += value
    return own


def validation_loss(training: TrainContext, budget: int, stop: Callable[[], bool] = lambda: False) -> float | None:
    """Return the loss over all validation examples, in nats per supervised token; None if `stop` returned true.

    Raises:
        MicroBatchTooLarge: memory ran out.
    """
    accelerator, reader = training.accelerator, training.validation
    assert reader is not None, "there are validation examples"
    shares = divide(np.arange(len(reader)), reader.lengths, accelerator.num_processes)
    cut = [micro_batches(share, reader.lengths, budget, training.packed, training.pass_tokens) for share in shares]
    own, turns = cut[accelerator.process_index], max(len(groups) for groups in cut)
    sums: list[tuple[float, int]] = []
    features: dict[int, torch.Tensor] = {}
    groups = _with_idle(training, own, turns, np.asarray([int(reader.lengths.argmin())]))
    totals = _sum_step_statistics(training, reader, groups, len(own), 0)
    training.model.eval()
    try:
        for turn in range(turns):
            fits = True
            if turn < len(groups):
                work = partial(_validate_batch, training, groups[turn], turn < len(own), sums, totals)
                if training.task.has_step_loss:
                    work = partial(_add_features, training, reader, groups[turn], features, 0)
                fits = try_memory(training, work)
            stopped, failed = sum_over_processes(accelerator, [float(stop()), float(not fits)])
            if failed:
                raise MicroBatchTooLarge
            if stopped:
                return None
    finally:
        training.model.train()
    if training.task.has_step_loss:
        return _loss_of_blocks(training, reader, features)
    total, count = sum_over_processes(accelerator, [sum(value for value, _ in sums), sum(count for _, count in sums)])
    return total / max(1, count)


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


def make_whole_batch(training: TrainContext, reader: ExampleReader, rows: Indexes) -> Batch:
    """Make a batch that counts as a complete step, without the other processes."""
    batch = make_batch(training, reader, rows)
    if training.task.has_step_statistics:
        with torch.no_grad(), training.compute():
            batch["totals"] = training.task.step_statistics(training.adapted.model, batch)
    return batch


def find_guilty_rows(training: TrainContext, suspects: Sequence[int]) -> list[int]:
    """Return the `suspects` whose own loss, in evaluation mode, is not finite; all of them if none is found.

    All processes check the same rows, as a sharded model needs.
    """
    guilty = []
    training.model.eval()
    with torch.no_grad(), training.compute():
        for row in suspects:
            batch = make_whole_batch(training, training.examples, np.asarray([row]))
            if not math.isfinite(float(training.task.loss(training.adapted.model, batch, False).sum)):
                guilty.append(row)
    training.model.train()
    return guilty or [*suspects]


def _own_groups(training: TrainContext, rows: Indexes, budget: int) -> tuple[list[Indexes], int]:
    """Return this process's micro-batches of a step, and how many of them count.

    The rest have weight zero: every process synchronises once, and under sharding all run the same number.
    """
    lengths = training.examples.lengths
    shares = divide(rows, lengths, training.accelerator.num_processes)
    cut = [micro_batches(share, lengths, budget, training.packed, training.pass_tokens) for share in shares]
    own = cut[training.accelerator.process_index]
    idle = rows[[int(lengths[rows].argmin())]]
    return _with_idle(training, own or [idle], max(len(groups) for groups in cut), idle), len(own)


def _with_idle(training: TrainContext, own: list[Indexes], count: int, idle: Indexes) -> list[Indexes]:
    """Pad this process's micro-batches to `count` if the model is sharded: each pass needs all processes."""
    return own + [idle] * (count - len(own)) if training.sharded else own


def _sum_step_statistics(
    training: TrainContext, reader: ExampleReader, groups: Sequence[Indexes], real: int, draw: int
) -> list[float] | None:
    """Sum the step statistics that the loss needs over the micro-batches of all processes; None if it needs none.

    All groups run, as a sharded model needs, but only the first `real` count. Raises MicroBatchTooLarge if memory ran
    out.
    """
    if not training.task.has_step_statistics:
        return None
    found: list[list[float]] = []

    def look(group: Indexes) -> None:
        batch = make_batch(training, reader, group, draw)
        with torch.no_grad(), training.compute():
            found.append(training.task.step_statistics(training.adapted.model, batch))

    mode = training.model.training
    training.model.eval()
    try:
        fits = all(try_memory(training, partial(look, group)) for group in groups)
    finally:
        training.model.train(mode)
    if any_process(training.accelerator, not fits):
        raise MicroBatchTooLarge
    del found[real:]
    width, having = sum_over_processes(training.accelerator, [float(len(found[0])), 1.0] if found else [0.0, 0.0])
    nothing = [0.0] * round(width / max(1.0, having))  # of a process without micro-batches
    sums = [sum(values) for values in zip(*found, strict=True)] if found else nothing
    return sum_over_processes(training.accelerator, sums)


def _cache_gradients(
    training: TrainContext, rows: Indexes, groups: Sequence[Indexes], real: int, step: int
) -> StepFeatures:
    """Compute the features of all rows of a step without a graph, and the gradient of the loss in them.

    The backward passes then send it into the model, one micro-batch at a time, so the loss compares all rows of a step
    in the memory of one micro-batch: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup", 2021. Seeds are those of the backward passes, for the same dropout.

    Raises:
        MicroBatchTooLarge: memory ran out in a pass, in all processes together. With a sharded model only one process
            raises, in the middle of a layer; it then ends, and with it the launch.
        TrainingError: memory ran out in the loss.
    """
    found: dict[int, torch.Tensor] = {}
    fits = True
    for index, group in enumerate(groups):
        seed_micro_batch(training, step, index)
        kept = found if index < real else {}
        fits = fits and try_memory(training, partial(_add_features, training, training.examples, group, kept, step))
    if any_process(training.accelerator, not fits):
        raise MicroBatchTooLarge
    found = _gather_features(training, found)
    leaves = [found[int(row)].requires_grad_() for row in rows]
    compared: list[tuple[Loss, tuple[torch.Tensor, ...]]] = []

    def compare() -> None:
        loss = training.task.step_loss(leaves, [training.examples[int(row)] for row in rows], training.recipe)
        compared.append((loss, torch.autograd.grad(loss.sum, leaves)))

    if not fits_in_memory(compare):  # smaller micro-batches would not help
        what = f"out of memory in the loss of step {step}, which compares all of its {len(rows):,} rows"
        raise TrainingError.of(what, "train.batch_size", "Lower it, or give rows fewer negatives.")
    ((loss, gradients),) = compared
    sums = None if loss.row_sums is None else loss.row_sums.detach()
    return StepFeatures(
        Loss(loss.sum.detach(), loss.count, row_sums=sums), dict(zip(rows.tolist(), gradients, strict=True))
    )


@torch.no_grad()
def _add_features(
    training: TrainContext, reader: ExampleReader, rows: Indexes, found: dict[int, torch.Tensor], draw: int
) -> None:
    batch = make_batch(training, reader, rows, draw)
    with training.compute():
        found.update(zip(rows.tolist(), training.task.features(training.adapted.model, batch), strict=True))


def _gather_features(training: TrainContext, own: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the features of all processes."""
    if training.accelerator.num_processes == 1:
        return own
    pairs = gather_lists(training.accelerator, [(row, one.cpu()) for row, one in own.items()])
    return {row: one.to(training.device) for row, one in pairs}


def _loss_of_blocks(training: TrainContext, reader: ExampleReader, own: dict[int, torch.Tensor]) -> float:
    """Return the mean loss over blocks of `train.batch_size` examples in order, as if each were a step."""
    found, size = _gather_features(training, own), training.recipe.train.batch_size
    training.spread.update(training.task.feature_metrics([found[row] for row in range(len(reader))]))
    blocks = [range(start, min(start + size, len(reader))) for start in range(0, len(reader), size)]
    losses = [
        training.task.step_loss([found[row] for row in block], [reader[row] for row in block], training.recipe)
        for block in blocks
    ]
    return sum(float(loss.sum) for loss in losses) / sum(loss.count for loss in losses)


def _backward_pass(
    training: TrainContext,
    rows: Indexes,
    weight: float,
    step: int,
    totals: list[float] | None,
    cached: StepFeatures | None,
) -> Loss:
    batch = make_batch(training, training.examples, rows, step) | ({} if totals is None else {"totals": totals})
    if cached is not None:
        with training.compute():
            features = training.task.features(training.model, batch)
        pairs = zip(rows.tolist(), features, strict=True)
        products = [(one * cached.gradients[row]).sum() for row, one in pairs]
        training.accelerator.backward(torch.stack(products).sum() * weight)
        return cached.loss_of(rows)
    with training.compute():
        loss = training.task.loss(training.model, batch, False)
    training.accelerator.backward(loss.sum * weight)
    return Loss(loss.sum.detach(), loss.count, row_sums=loss.row_sums)


def _validate_batch(
    training: TrainContext, rows: Indexes, real: bool, sums: list[tuple[float, int]], totals: list[float] | None
) -> None:
    """Add the loss's sum and count to `sums` if `real`."""
    assert training.validation is not None
    batch = make_batch(training, training.validation, rows) | ({} if totals is None else {"totals": totals})
    with torch.no_grad(), training.compute():
        loss = training.task.loss(training.model, batch, False)
    if real:
        sums.append((float(loss.sum), loss.count))


def _finish_gradients(training: TrainContext, factor: float) -> float:
    """Multiply the gradients by `factor`, clip them in place, and return their norm before clipping."""
    if factor != 1:
        for parameter in training.parameters:
            if parameter.grad is not None:
                own_part(parameter.grad).mul_(factor)
    norm = training.accelerator.clip_grad_norm_(training.parameters, training.recipe.train.max_grad_norm or math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
