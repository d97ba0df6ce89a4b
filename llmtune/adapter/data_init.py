"""LoRA initializations computed from training rows by PEFT: EVA, CorDA and LoRA-GA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from llmtune.data.examples import ExampleReader
from llmtune.data.task_interface import TaskInterface
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.recipe.adapter_section import DATA_STARTS
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Examples, Loss, SelectedModel

SAMPLED, AT_ONCE = 64, 4
"""Training rows used for an initialization, and rows per micro-batch."""


@dataclass(frozen=True)
class RowSample:
    """Some training rows as micro-batches, and the task's loss on one."""

    batches: Callable[[], Iterator[Batch]]
    loss: Callable[[torch.nn.Module, Batch], Loss]

    def read(self, model: torch.nn.Module) -> None:
        """Run `model` on the rows, without gradients."""
        with torch.no_grad():
            for batch in self.batches():
                self.loss(model, batch)

    def learn(self, model: torch.nn.Module) -> None:
        """Accumulate the gradients of the rows in `model`."""
        for batch in self.batches():
            loss = self.loss(model, batch)
            (loss.sum / max(1, loss.count)).backward()  # type: ignore[no-untyped-call]


def sample_rows(examples: Examples, task: TaskInterface, selected: SelectedModel, recipe: Recipe) -> RowSample:
    """Return SAMPLED training rows, spread over all, in the task's micro-batches."""
    reader = ExampleReader(examples, "train", task.example_type)
    collate = task.collator(selected.processor, recipe, selected.packs)
    rows = [len(reader) * i // SAMPLED for i in range(SAMPLED)] if len(reader) > SAMPLED else [*range(len(reader))]
    dtype, device = resolve_dtype(recipe.model.dtype, selected.model.device.type), selected.model.device
    at_once = 1 if recipe.adapter.init_lora_weights == "corda" else AT_ONCE  # PEFT's CorDA processes one row at a time

    def batches() -> Iterator[Batch]:
        for start in range(0, len(rows), at_once):
            yield move_to(device, collate([reader[row] for row in rows[start : start + at_once]], 0))

    def loss(model: torch.nn.Module, batch: Batch) -> Loss:
        with compute_context(dtype, device.type):
            return task.loss(model, batch, False)

    return RowSample(batches, loss)


@dataclass(frozen=True)
class _OnDevice:
    """A micro-batch that is already on its device: PEFT moves its input, and warns about numbers next to tensors."""

    batch: Batch

    def to(self, device: object) -> _OnDevice:
        return self


def prepare_start(model: torch.nn.Module, config: LoraConfig, sample: RowSample | None) -> None:
    """Compute what CorDA and LoRA-GA start from and store it on the modules of `model`; other methods need nothing."""
    start = config.init_lora_weights
    if start not in DATA_STARTS:
        return
    assert sample is not None, "an initialization from rows needs rows"
    if start == "corda":
        preprocess_corda(model, config, lambda: sample.read(model))
    elif start == "lora_ga":
        with warnings.catch_warnings():  # torch warns: the first layers read tokens, which have no gradient
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            preprocess_loraga(model, config, lambda: sample.learn(model))


def finish_start(model: PeftModel, sample: RowSample | None) -> None:
    """Let EVA choose the matrices A and each module's rank from the modules' inputs on the rows."""
    if model.peft_config["default"].init_lora_weights != "eva":
        return
    assert sample is not None, "an initialization from rows needs rows"
    initialize_lora_eva_weights(
        model,
        [_OnDevice(batch) for batch in sample.batches()],
        forward_fn=lambda model, read: sample.loss(model, read.batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        gather_distributed_inputs=False,  # the process that builds the model has all rows; the others wait for it
        show_progress_bar=False,
    )
