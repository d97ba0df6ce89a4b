"""What differs from task to task: a class with its facts and methods. A variant is for another kind of model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmtune.data.collators import causal_collator
from llmtune.data.example import Collate, Example
from llmtune.data.task_interface import Encoded
from llmtune.evaluate.evaluated_task import EvaluatedTask, PredictionT
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Loss, Rows

RowT = TypeVar("RowT")
"""A row of the task: a TypedDict."""


@dataclass(frozen=True)
class Endpoint:
    """Where a served model of a task answers; chat, and models that continue a text, have OpenAI's endpoints."""

    path: str
    prediction: str
    """What the field `prediction` of an answer is."""
    prompt_field: str = "text"
    """The field for what `llmtune generate` calls the prompt."""


class Task(EvaluatedTask, Generic[RowT, PredictionT]):
    """A task for one kind of model; the defaults are those of a task that answers a prompt in text."""

    required_inputs: tuple[str, ...] = ("prompt",)
    """Inputs that a person must give to `llmtune generate`: prompt, context, audio, answer."""
    optional_inputs: tuple[str, ...] = ()
    """Further inputs that a person may give: system, pair."""
    free_prompt: bool = False
    """Whether a person's own words are the prompt, with no other text around them than the chat template's."""
    is_conversational: bool = False
    """Whether rows are conversations: lists of messages."""
    takes_audio: bool = False
    endpoint: Endpoint | None = None

    @property
    def inputs(self) -> Mapping[str, bool]:
        """What a person gives to `llmtune generate`, and whether it is needed."""
        return {**dict.fromkeys(self.required_inputs, True), **dict.fromkeys(self.optional_inputs, False)}

    def matches(self, recipe: Recipe) -> bool:
        """Whether this variant is what the recipe asks for."""
        return True

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Return the recipe with what the rows decide, such as names of classes."""
        return recipe

    def make_row(self, given: Mapping[str, str | None]) -> RowT:
        """Return the prompt row of what a person gave, by the names of `inputs`."""
        raise NotImplementedError

    def encode(self, rows: Sequence[RowT], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the examples of each row, or the reason why it has none."""
        return [self.encode_row(row, processor, recipe) for row in rows]

    def encode_row(self, row: RowT, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
        """Return the examples of one row, where rows are encoded one by one."""
        raise NotImplementedError

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what makes micro-batches."""

        def collate(examples: Sequence[Example], draw: int = 0) -> Batch:
            return self.collate(examples, processor, recipe, bool(packs), draw)

        return collate

    def collate(
        self, examples: Sequence[Example], processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool, draw: int
    ) -> Batch:
        """Make one micro-batch; `draw` seeds anything random in it, such as masks; 0 in evaluation."""
        raise NotImplementedError

    def format_answer(self, prediction: PredictionT, row: RowT) -> str:
        """Write the prediction of one prompt row for the terminal, with more detail where there is any."""
        return self.format_prediction(prediction)

    def output_kind(self, recipe: Recipe) -> str:
        """Return what the outputs of a head are: `choice` (one of K), `yes-no` (K questions) or `number`."""
        return "choice"


class DecoderTask(Task[RowT, str]):
    """A decoder that continues a prompt."""

    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    packs = True
    predicts = False
    continues_text = True

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what packs rows, or pads them."""
        return causal_collator(processor, recipe, packs)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the tokens that are learned."""
        return causal_loss(model, batch, by_row)


def next_steps(run: Path, task: Task[Any, Any]) -> str:
    """Return where the report of a run lies, and what a person types to use its model and to serve it."""
    name = shlex.quote(str(run))
    given = " ".join('"TEXT"' if one == "prompt" else f"--{one} {one.upper()}" for one in task.required_inputs)
    talk = [f"llmtune chat {name}"] if task.is_conversational and task.free_prompt else []
    commands = [*talk, f"llmtune generate {name} {given}", f"llmtune deploy serve {name}"]
    return "\n".join([f"report: {run / 'report.html'}", *(f"next: {command}" for command in commands)])


def loss_of_rows(losses_R: torch.Tensor, correct_R: torch.Tensor, by_row: bool) -> Loss:
    """Return the loss of rows with one prediction each."""
    right_R = correct_R.to(losses_R.dtype)
    if not by_row:
        return Loss(losses_R.sum(), len(losses_R), right_R.sum(), losses_R.detach())
    return Loss(losses_R.sum(), len(losses_R), right_R.sum(), losses_R, right_R)


AnyTask: TypeAlias = Task[Any, Any]
