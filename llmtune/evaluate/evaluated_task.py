"""What evaluation needs of a task beyond `TaskInterface`: prompts, predictions and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from llmtune.data.task_interface import TaskInterface
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.tool_metrics import ToolTurn
from llmtune.records import Advance, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Prediction = Any
"""What a task predicts of a row: a JSON value."""
PredictionT = TypeVar("PredictionT")


@dataclass(frozen=True)
class EvalPrediction(Generic[PredictionT]):
    """What one model predicted of some rows, beside what is right."""

    predictions: Sequence[PredictionT]
    references: Sequence[Any]
    base: Sequence[PredictionT] | None = None
    """What the base model predicted of them; None where that is not known of all."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that predicts, with what that takes."""

    model: torch.nn.Module
    processor: PreTrainedTokenizerBase
    recipe: Recipe
    device: str
    advance: Advance = lambda rows: None
    """Called with a number of rows whenever so many are done."""
    note_end: Callable[[int, bool], None] = lambda row, is_cut: None
    """Called for each answer that is written token by token: the row's position, and whether it was cut."""


class EvaluatedTask(TaskInterface, Protocol):
    """A task that is evaluated."""

    loss_unit: str
    """What the loss is a mean over, where that is not tokens."""
    has_row_loss: bool
    """Whether the loss of a row can be taken by itself."""
    continues_text: bool
    """Whether an answer is written token by token behind a prompt: `prompt_ids` gives it."""
    predicts: bool
    """Whether `predict` gives what is evaluated; else it is generated from `prompt_ids`."""
    rates_answers: bool
    """Whether a row brings answers, and a prediction rates them."""

    def split_answer(self, row: Row) -> tuple[Row, str]:
        """Return the row without its answer, and the answer as text."""

    def reference(self, row: Row) -> Prediction:
        """Return what predictions are compared with."""

    def tool_turns(self, row: Row, recipe: Recipe) -> list[ToolTurn]:
        """Return all answers of a row that has tools, its own last; each is generated and scored by its calls."""

    def prompt_ids(self, row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to generate from; the same in training, evaluation and chat."""

    def predict(self, rows: Sequence[Row], loaded: LoadedModel) -> list[Prediction]:
        """Return a prediction for each prompt row, in their order."""

    def format_prediction(self, prediction: Prediction) -> str:
        """Write a prediction as a person reads it."""

    def compute_metric(self, metric: str, found: EvalPrediction[Any], recipe: Recipe) -> Measure | None:
        """Return a metric that is the task's own; None for one that it has not."""

    def baseline(
        self, references: Sequence[Prediction], prompts: Sequence[Row], recipe: Recipe
    ) -> tuple[str, list[Prediction]]:
        """Return name and predictions of what stands for a base model whose head is new, from training references."""

    def class_table(self, found: EvalPrediction[Any], recipe: Recipe) -> dict[str, Any] | None:
        """Return what the report shows beside the scores (classes, confusion); None for a task without classes."""
