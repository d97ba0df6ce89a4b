"""Task qa: find the answer in a text; an encoder points at it, a decoder or an encoder-decoder writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from llmtune.data import iterate_rows
from llmtune.data.data_report import ends_pieces
from llmtune.data.label_encoding import encode_windows
from llmtune.data.seq2seq_encoding import Pair
from llmtune.data.target_collators import ends_collator
from llmtune.data.task_interface import Encoded
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.task_predictions import predict_ends
from llmtune.evaluate.text_metrics import measure_squad
from llmtune.model.config import is_encoder
from llmtune.model.task_losses import ends_loss
from llmtune.recipe import QaSection
from llmtune.records import Advance, Batch, Collate, Example, Loss, Rows
from llmtune.tasks.base import PredictionT, Task
from llmtune.tasks.text_to_text import EncoderDecoder, PromptedDecoder, fill_template

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

METRICS = ("exact_match", "f1")
SOURCE = "question: {question} context: {context}"
"""What an encoder-decoder reads, as T5 was trained on SQuAD."""
PROMPT = (
    "{context}\n\nAnswer with words from the text above, or say {no_answer} if it holds no answer.\n"
    "Question: {question}"
)
"""The text comes first: where it is cut to `data.max_length`, its start goes, and the question stays."""


class Answer(TypedDict):
    """A stretch of the context."""

    text: str
    start: int | None
    """Its first character in the context; None for an answer that was written."""


class QaRow(TypedDict):
    """A question on a context."""

    question: str
    context: str
    answers: list[Answer] | None
    """All that are right; empty where the context holds none; None where they were taken away."""


class Span(TypedDict):
    """A predicted answer: characters of the context, with its score and that of `no answer`."""

    text: str
    start: int | None
    end: int | None
    score: float | None
    null_score: float | None


class Qa(Task[QaRow, PredictionT]):
    """The rows of qa."""

    name = "qa"
    required_inputs = ("prompt", "context")

    def make_row(self, given: Mapping[str, str | None]) -> QaRow:
        """Return the row of a question on a context."""
        return {"question": given["prompt"] or "", "context": given["context"] or "", "answers": None}

    def split_answer(self, row: QaRow) -> tuple[QaRow, str]:
        """Return the row without its answers, and the first of them as text."""
        return {**row, "answers": None}, row["answers"][0]["text"] if row["answers"] else "(no answer)"

    def reference(self, row: QaRow) -> list[str]:
        """Return all answers; none is an empty list."""
        return [answer["text"] for answer in row["answers"] or ()]

    def compute_metric(
        self,
        metric: str,
        predictions: Sequence[PredictionT],
        references: Sequence[list[str]],
        recipe: Recipe,
        base: Sequence[PredictionT] | None = None,
    ) -> Measure | None:
        """Measure answers as the SQuAD 2 script counts; the words for `no answer` are the empty answer."""
        if metric not in METRICS:
            return None
        empty = section_of(recipe).no_answer.strip().lower().rstrip(".")
        texts = [str(answer["text"] if isinstance(answer, dict) else answer) for answer in predictions]
        texts = ["" if text.strip().lower().rstrip(".") == empty else text for text in texts]
        return measure_squad(metric, texts, references)


class ExtractiveQa(Qa[Span]):
    """An encoder that points at the first and the last token of an answer."""

    auto_class = "AutoModelForQuestionAnswering"
    peft_task_type = "QUESTION_ANS"
    packs = True
    loss_unit = "windows"
    predicts_tokens = False
    trains_head = True

    def matches(self, recipe: Recipe) -> bool:
        """Whether the recipe lets the model point."""
        return section_of(recipe).style in ("auto", "extractive")

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model is an encoder."""
        return is_encoder(config)

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Set the threshold of `no answer`, unless the recipe does: never, where every training row has an answer."""
        section = section_of(recipe)
        if section.null_score_diff_threshold is not None:
            return recipe
        always = all(row["answers"] for _, row in iterate_rows(rows, "train"))
        threshold = math.inf if always else 0.0
        return recipe.model_copy(update={"qa": section.model_copy(update={"null_score_diff_threshold": threshold})})

    def encode(self, rows: Sequence[QaRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return an example for each window of a row; one that does not hold the answer points at `no answer`."""
        return encode_windows(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what packs windows, or pads them."""
        return ends_collator(processor, recipe, bool(packs))

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the answers' ends over windows."""
        return ends_loss(model, batch, by_row)

    def highlighted_text(
        self, example: Example, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[tuple[str, bool]]:
        """Show a window with its answer; where it has none, the token that stands for that."""
        return ends_pieces(example, processor, recipe)

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[QaRow],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[Span]:
        """Return the best stretch of each context over all windows."""
        return predict_ends(model, rows, processor, recipe, device=device, advance=advance)

    def format_prediction(self, prediction: Span) -> str:
        """Write the text of an answer."""
        return prediction["text"] or "(no answer)"

    def format_answer(self, prediction: Span, row: QaRow) -> str:
        """Write an answer with its characters in the context."""
        text = self.format_prediction(prediction)
        if not prediction["text"]:
            return text
        return f"{text}\n(characters {prediction['start']} to {prediction['end']} of the context)"

    def baseline(
        self, references: Sequence[list[str]], prompts: Sequence[QaRow], recipe: Recipe
    ) -> tuple[str, list[Span]]:
        """Answer no question."""
        nothing: Span = {"text": "", "start": None, "end": None, "score": None, "null_score": None}
        return "no answer to every question", [nothing.copy() for _ in prompts]


class GenerativeQa(Qa[str]):
    """A model that writes its answers."""

    default_prompt = SOURCE

    def matches(self, recipe: Recipe) -> bool:
        """Whether the recipe lets the model write."""
        return section_of(recipe).style in ("auto", "generative")

    def pair(self, row: QaRow, recipe: Recipe) -> Pair:
        """Return question and context in one text, and the first answer."""
        section = section_of(recipe)
        template = section.prompt or self.default_prompt
        text = fill_template(template, question=row["question"], no_answer=section.no_answer, context=row["context"])
        return Pair(text, answer_text(row, section.no_answer))


class QaEncoderDecoder(GenerativeQa, EncoderDecoder[QaRow]):
    """A model of two parts that writes its answers."""


class QaDecoder(GenerativeQa, PromptedDecoder[QaRow]):
    """A decoder that is asked by prompt."""

    default_prompt = PROMPT


def section_of(recipe: Recipe) -> QaSection:
    """Return the recipe's section, or its defaults."""
    return recipe.qa or QaSection()


def answer_text(row: QaRow, no_answer: str) -> str:
    """Return the first answer; `no_answer` where there is none; nothing for a row whose answers were taken away."""
    if row["answers"] is None:
        return ""
    return row["answers"][0]["text"] if row["answers"] else no_answer


VARIANTS = (ExtractiveQa(), QaEncoderDecoder(), QaDecoder())
