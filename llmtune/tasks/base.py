"""The base class of tasks: facts and methods that differ by task. A variant handles another kind of model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.collators import causal_collator
from llmtune.data.example import AnyExample, Collate
from llmtune.data.row_store import iterate_rows
from llmtune.data.task_interface import Encoded
from llmtune.evaluate.evaluated_task import PredictionT
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.model.config import set_padding
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Loss, Rows
from llmtune.train.objective import TrainedTask

if TYPE_CHECKING:
    from llmtune.data.text_pairs import TextPair
    from llmtune.model.audio_models import SoundWindow
    from llmtune.model.sentence_folder import SentenceSettings

RowT = TypeVar("RowT")
"""A row of the task: a TypedDict."""


@dataclass(frozen=True)
class Endpoint:
    """The HTTP endpoint of a served model; chat, and models that continue a text, use OpenAI's endpoints."""

    path: str
    prediction: str
    """Description of the answer's field `prediction`."""
    prompt_field: str = "text"
    """The request field for the prompt of `llmtune generate`."""


class Task(TrainedTask, Generic[RowT, PredictionT]):
    """A task for one kind of model; by default, a decoder answers a prompt with text."""

    required_inputs: tuple[str, ...] = ("prompt",)
    """Inputs that `llmtune generate` requires: prompt, context, audio, answer."""
    optional_inputs: tuple[str, ...] = ()
    """Optional inputs: system, pair, source_language, target_language."""
    free_prompt: bool = False
    """Whether the user's own words are the prompt, with nothing around them except the chat template."""
    is_conversational: bool = False
    """Whether rows are conversations: lists of messages."""
    style: str | None = None
    """The style of `qa` that this kind of model has."""
    endpoint: Endpoint | None = None

    @property
    def inputs(self) -> Mapping[str, bool]:
        """The inputs of `llmtune generate`, and whether each is required."""
        return {**dict.fromkeys(self.required_inputs, True), **dict.fromkeys(self.optional_inputs, False)}

    def matches(self, recipe: Recipe) -> bool:
        """Whether the recipe selects this variant."""
        return True

    def make_row(self, given: Mapping[str, str | None]) -> RowT:
        """Return a prompt row from the user's inputs, named as in `inputs`."""
        raise NotImplementedError

    def stated_inputs(self, row: RowT, recipe: Recipe) -> dict[str, str | None]:
        """Return the optional inputs that a row states, such as its languages."""
        fields = cast(Mapping[str, str | None], row)
        return {name: fields.get(name) for name in self.optional_inputs}

    def prepare_processor(self, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Set in place what a tokenizer needs to know from the recipe, such as a spoken language."""

    def pair(self, row: RowT, recipe: Recipe) -> TextPair:
        """Return the source, as this kind of model reads it, and the target; for tasks that write a text for a text."""
        raise NotImplementedError

    def query_ids(self, text: str, processor: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[list[int], str]:
        """Return the tokens of a query and the prompt before it; for tasks whose models make vectors."""
        raise NotImplementedError

    def named_texts(self, row: RowT) -> list[tuple[str, str]]:
        """Return all texts of a row, each with its name; for tasks whose models make vectors."""
        raise NotImplementedError

    def first_window(self, audio: Path, processor: PreTrainedTokenizerBase, recipe: Recipe) -> SoundWindow:
        """Return the first window of a recording.

        For tasks with recordings. Raises DataError if it cannot be read, and RecipeError if it contains no sound.
        """
        raise NotImplementedError

    def sentence_settings(self, recipe: Recipe) -> SentenceSettings | None:
        """Return how vectors are made; None for tasks without vectors."""
        return None

    def set_generation(self, settings: GenerationConfig, recipe: Recipe) -> None:
        """Set in place what saved generation settings state of the recipe; for models that keep their own settings."""

    def export_constants(self, recipe: Recipe, processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return further settings of the program next to ONNX files."""
        return {}

    def encode(self, rows: Sequence[RowT], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the examples of each row, or the reason why it has none."""
        return [self.encode_row(row, processor, recipe) for row in rows]

    def encode_row(self, row: RowT, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
        """Return the examples of one row; for tasks that encode rows one by one."""
        raise NotImplementedError

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return the function that makes micro-batches; a decoder's tokens are packed, or padded."""
        if self.model_kind.decodes and self.predicts_tokens:
            return causal_collator(processor, recipe, packs)

        def collate(examples: Sequence[AnyExample], draw: int = 0) -> Batch:
            return self.collate(examples, processor, recipe, bool(packs), draw)

        return collate

    def collate(
        self, examples: Sequence[AnyExample], processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool, draw: int
    ) -> Batch:
        """Make one micro-batch; `draw` seeds random parts such as masks; evaluation passes 0."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the supervised tokens."""
        return causal_loss(model, batch, by_row)

    def format_answer(self, prediction: PredictionT, row: RowT) -> str:
        """Write the prediction of one prompt row for the terminal, with details if available."""
        return self.format_prediction(prediction)


class ReadingTask(Task[RowT, PredictionT]):
    """An encoder or decoder that reads complete texts, padded or packed, and predicts no tokens."""

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether a model is an encoder or a decoder: an encoder-decoder's head needs an end token in each text."""
        return not getattr(config, "is_encoder_decoder", False)

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Set the token that a decoder's rows are padded with."""
        set_padding(model, processor)


def option_of(name: str) -> str:
    """Return the option of `llmtune generate` for an input."""
    return f"--{name.replace('_', '-')}"


def next_steps(run: Path, task: Task[Any, Any], rows: Rows, remedies: Sequence[str] = ()) -> str:
    """Return the path of a run's report, and the commands to use and serve its model, or what would help it.

    An optional input is named if the first row has it; the prompt also if no input is required.
    """
    name = shlex.quote(str(run))
    _, row = next(iterate_rows(rows, "train"), ("", {}))
    free = "" if any(task.inputs.values()) else "prompt"
    inputs = [one for one, required in task.inputs.items() if required or row.get(one) or one == free]
    given = " ".join('"TEXT"' if one == "prompt" else f"{option_of(one)} {one.upper()}" for one in inputs)
    talk = [f"llmtune chat {name}"] if task.is_conversational and task.free_prompt else []
    commands = [*talk, f"llmtune generate {name} {given}", f"llmtune deploy serve {name}"]
    return "\n".join([f"report: {run / 'report.html'}", *(f"next: {command}" for command in remedies or commands)])


def loss_of_rows(losses_R: torch.Tensor, correct_R: torch.Tensor, by_row: bool) -> Loss:
    """Return the loss of rows that have one prediction each."""
    right_R = correct_R.to(losses_R.dtype)
    if not by_row:
        return Loss(losses_R.sum(), len(losses_R), right_R.sum(), losses_R.detach())
    return Loss(losses_R.sum(), len(losses_R), right_R.sum(), losses_R, right_R)


AnyTask: TypeAlias = Task[Any, Any]
