"""Evaluation's interface to a task, on top of `TaskInterface`: prompts, predictions and metrics, with defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtune.data.example import AnyExample
from llmtune.data.task_interface import TaskInterface
from llmtune.records import Advance, Prompt, Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llmtune.data.answer_parser import ParsedAnswer, ToolTurn
    from llmtune.data.pictures import Picture
    from llmtune.evaluate.metric import Measure
    from llmtune.recipe.schema import Recipe
    from llmtune.records import Rows
    from llmtune.store.score_records import Study

PredictionT = TypeVar("PredictionT")
"""A task's prediction for a row: a JSON value."""
LearnedClasses: TypeAlias = list[tuple[int | None, list[int]]]
"""For each token with a class, its position; or None for a text. Then the class, or 0 or 1 for each class."""


@dataclass(frozen=True)
class Corpus:
    """Passages of `data.corpus` (P) with one model's vectors of them."""

    passages: Sequence[str]
    vectors_PD: NDArray[np.float32]  # noqa: N815


@dataclass(frozen=True)
class EvalPrediction(Generic[PredictionT]):
    """One model's predictions for some rows, with their references."""

    predictions: Sequence[PredictionT]
    references: Sequence[Any]
    base: Sequence[PredictionT] | None = None
    """The base model's predictions for them; None unless all are known."""
    corpus: Corpus | None = None
    """Further passages that queries are searched in, with their vectors."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with everything needed to predict."""

    model: torch.nn.Module
    processor: PreTrainedTokenizerBase
    recipe: Recipe
    device: str
    advance: Advance = lambda rows: None
    """Called with the number of rows finished since the last call."""
    note_end: Callable[[int, bool], None] = lambda row, is_cut: None
    """Called for each generated answer with the row's position and whether the answer was truncated."""
    temperature: float = 1.0
    """Divides the logits of labels before they become probabilities (`llmtune.evaluate.calibration`)."""
    note_logits: Callable[[int, list[list[float]]], None] = lambda row, logits: None
    """Called by tasks with `output_labels`, with the row's position and the logits of each of its choices. They are
    empty for a word that the model cannot see."""


class SimplePredictions(NamedTuple):
    """The predictions of a baseline without a language model."""

    predictions: list[Any]
    note: str
    """What was fitted, and on what."""
    logits: Sequence[list[list[float]]] = ()
    """As in `LoadedModel.note_logits`, for tasks with `output_labels`."""


class EvaluatedTask(TaskInterface):
    """A task that is evaluated."""

    loss_unit: str = "rows"
    """Unit that the loss is a mean over."""
    has_row_loss: bool = True
    """Whether the loss of a single row can be computed."""
    answer_keys: tuple[str, ...] = ()
    """Keys of a prediction that are written next to it."""
    has_rewards: bool = False
    """Whether sampled answers are rated by rewards, with `rate_samples`; rows then need no reference."""
    adapter_metrics: tuple[str, ...] = ()
    """Metrics that compare a model with itself without its adapter; exports, which have none, lack them."""

    @property
    def predicts(self) -> bool:
        """Return whether `predict` returns what is evaluated; otherwise it is generated from `prompt_ids`."""
        return self.rates_answers or not self.model_kind.decodes

    def split_answer(self, row: Any) -> tuple[Any, str]:
        """Return the row without its answer, and the answer as text."""
        raise NotImplementedError

    def fill_answer(self, row: Any, answer: str) -> Any:
        """Return the row with another text as its answer."""
        question, before = self.split_answer(row)
        changed = [key for key, value in row.items() if value == before and question.get(key) != value]
        return {**row, **dict.fromkeys(changed, answer)}

    def take_answer(self, row: Any, answer: ParsedAnswer) -> Any:
        """Return the row with a generated answer in the place of its own."""
        return self.fill_answer(row, answer.text)

    def reference(self, row: Any) -> Any:
        """Return the value that predictions are compared with."""
        return self.split_answer(row)[1]

    def words(self, row: Any) -> list[str] | None:
        """Return the words that a prediction tags one by one; None for other predictions."""
        return None

    def output_labels(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the labels that the model's head chooses from, in the order of its outputs; empty without such."""
        return ()

    def right_labels(self, reference: Any) -> list[list[str]]:
        """Return the right labels of each choice in a row; for tasks with `output_labels`."""
        raise NotImplementedError

    def learned_classes(self, example: AnyExample) -> LearnedClasses:
        """Return the classes of an example by their numbers; for tasks with `output_labels`."""
        raise NotImplementedError

    def output_kind(self, recipe: Recipe) -> str:
        """Return the kind of a head's outputs: `choice` (one of K), `yes-no` (K questions) or `number`."""
        return "choice"

    def count_tokens(self, row: Any, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int) -> int:
        """Return the tokens of a row's longest text, counted up to `limit`; 0 for a task that never cuts texts."""
        return 0

    def cuts_texts(self, recipe: Recipe) -> bool:
        """Whether `predict` reads the start of a longer text; otherwise such a text is refused."""
        return recipe.data.on_overlong in ("truncate", "split")

    def embed_passages(self, passages: Sequence[str], loaded: LoadedModel) -> NDArray[np.float32]:
        """Return the vectors [P, D] of passages without a query; for tasks that search `data.corpus`."""
        raise NotImplementedError

    def row_notes(self, rows: Rows, split: str, recipe: Recipe) -> dict[str, str]:
        """Return notes on the evaluated rows of a split for the report, by subject."""
        return {}

    def list_pictures(self, row: Any) -> list[Picture]:
        """Return the pictures of a row."""
        return []

    def with_pictures(self, row: Any, pictures: Sequence[Picture]) -> Any:
        """Return the row with other pictures in the places of its own."""
        raise NotImplementedError

    def can_answer(self, row: Row, processor: PreTrainedTokenizerBase) -> bool:
        """Return whether a row has what its answer needs besides a prompt, such as a mask."""
        return True

    def tool_turns(self, row: Any, recipe: Recipe) -> list[ToolTurn]:
        """Return all answers of a row with tools, its own last; each is generated and scored by its calls."""
        return []

    def prompt(self, row: Any, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Prompt:
        """Return what to generate from: by default text alone."""
        return Prompt(self.prompt_ids(row, processor, recipe))

    def prompt_ids(self, row: Any, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to generate from; the same in training, evaluation and chat."""
        raise NotImplementedError

    def predict(self, rows: Sequence[Any], loaded: LoadedModel) -> list[Any]:
        """Return a prediction for each prompt row, in order."""
        raise NotImplementedError

    def rate_samples(self, rows: Sequence[Row], answers: Sequence[ParsedAnswer], loaded: LoadedModel) -> list[Any]:
        """Sample answers to complete rows, and rate them and the `answers` that the model gave; for tasks with rewards.

        Raises an LlmtuneError if a reward fails.
        """
        raise NotImplementedError

    def study_answers(
        self,
        base: Mapping[int, Any],
        tuned: Mapping[int, Any],
        prompts: Sequence[str],
        clusters: Sequence[int],
        recipe: Recipe,
    ) -> dict[str, Study]:
        """Return further studies of both models' predictions, by name; the keys are indexes into the evaluated rows."""
        return {}

    def format_prediction(self, prediction: Any) -> str:
        """Return a prediction as text for display."""
        return str(prediction)

    def compute_metric(self, metric: str, output: EvalPrediction[Any], recipe: Recipe) -> Measure | None:
        """Return a metric of the task's own; None for an unknown one."""
        return None

    def baseline(self, references: Sequence[Any], prompts: Sequence[Any], recipe: Recipe) -> tuple[str, list[Any]]:
        """Return name and predictions of the baseline for a base without a trained head, from training references."""
        raise NotImplementedError

    def frozen_features(self, rows: Sequence[Any], loaded: LoadedModel) -> list[NDArray[np.float64]]:
        """Return the features [F] of rows by a base without training; for tasks with the baseline `frozen`."""
        raise NotImplementedError

    def predict_frozen(
        self, train: Sequence[Any], prompts: Sequence[Any], features: Sequence[NDArray[np.float64]], recipe: Recipe
    ) -> SimplePredictions | str:
        """Predict from features of the training rows and then of the prompts; the reason if it cannot be."""
        raise NotImplementedError

    def predict_simply(self, train: Sequence[Any], prompts: Sequence[Any], recipe: Recipe) -> SimplePredictions | str:
        """Predict with a baseline that counts words, from training rows; the reason if it cannot be."""
        raise NotImplementedError

    def measure_words(
        self, metric: str, references: Sequence[Any], corpus: Sequence[str], recipe: Recipe
    ) -> Measure | None:
        """Return a metric of BM25; for tasks that search passages."""
        raise NotImplementedError

    def as_prediction(self, reference: Any, recipe: Recipe) -> Any:
        """Return the prediction that equals a reference; None for tasks without classes."""
        return None

    def class_table(self, output: EvalPrediction[Any], recipe: Recipe) -> dict[str, Any] | None:
        """Return tables for the report: of classes with their confusions, of vector lengths; None without such."""
        return None
