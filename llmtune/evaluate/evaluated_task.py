"""What evaluation needs of a task beyond `TaskInterface`, with its defaults: prompts, predictions and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llmtune.data.task_interface import TaskInterface
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.tool_metrics import ToolTurn
from llmtune.records import Advance

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe.schema import Recipe

PredictionT = TypeVar("PredictionT")
"""What a task predicts of a row: a JSON value."""


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


class EvaluatedTask(TaskInterface):
    """A task that is evaluated."""

    loss_unit: str = "rows"
    """What the loss is a mean over, where that is not tokens."""
    has_row_loss: bool = True
    """Whether the loss of a row can be taken by itself."""
    continues_text: bool = False
    """Whether an answer is written token by token behind a prompt: `prompt_ids` gives it."""
    predicts: bool = True
    """Whether `predict` gives what is evaluated; else it is generated from `prompt_ids`."""
    rates_answers: bool = False
    """Whether a row brings answers, and a prediction rates them."""

    def split_answer(self, row: Any) -> tuple[Any, str]:
        """Return the row without its answer, and the answer as text."""
        raise NotImplementedError

    def reference(self, row: Any) -> Any:
        """Return what predictions are compared with."""
        return self.split_answer(row)[1]

    def tool_turns(self, row: Any, recipe: Recipe) -> list[ToolTurn]:
        """Return all answers of a row that has tools, its own last; each is generated and scored by its calls."""
        return []

    def prompt_ids(self, row: Any, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to generate from; the same in training, evaluation and chat."""
        raise NotImplementedError

    def predict(self, rows: Sequence[Any], loaded: LoadedModel) -> list[Any]:
        """Return a prediction for each prompt row, in their order."""
        raise NotImplementedError

    def format_prediction(self, prediction: Any) -> str:
        """Write a prediction as a person reads it."""
        return str(prediction)

    def compute_metric(self, metric: str, found: EvalPrediction[Any], recipe: Recipe) -> Measure | None:
        """Return a metric that is the task's own; None for one that it has not."""
        return None

    def baseline(self, references: Sequence[Any], prompts: Sequence[Any], recipe: Recipe) -> tuple[str, list[Any]]:
        """Return name and predictions of what stands for a base model whose head is new, from training references."""
        raise NotImplementedError

    def as_prediction(self, reference: Any, recipe: Recipe) -> Any:
        """Return the prediction that equals a reference, of a task whose rows have classes; None for any other."""
        return None

    def class_table(self, found: EvalPrediction[Any], recipe: Recipe) -> dict[str, Any] | None:
        """Return what the report shows beside the scores (classes, confusion); None for a task without classes."""
        return None
