"""Task preference: learn from pairs of a better and a worse answer, or from thumbs; or train a model that scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llmtune.adapter.reference_model import reference_of
from llmtune.data import iterate_rows
from llmtune.data.data_report import preference_pieces
from llmtune.data.preference_encoding import answer_columns, describe_rows, encode_preference, render_preference
from llmtune.data.target_collators import preference_collator
from llmtune.data.task_interface import Encoded
from llmtune.errors import DataError, LlmtuneError
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.preference_metrics import measure_preferences, predict_preferences
from llmtune.model.heads import check_padding, name_outputs
from llmtune.model.preference_losses import preference_loss, survey
from llmtune.recipe import PreferenceSection
from llmtune.records import Advance, Batch, Collate, Example, Loss, Row, Rows
from llmtune.tasks.base import Task
from llmtune.tasks.chat import question_messages

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Ratings = dict[str, float]
"""What a model makes of a row's answers: log-probabilities or scores by name."""


class Preference(Task[Row, Ratings]):
    """A decoder that learns which answers to prefer, and answers."""

    name = "preference"
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    optional_inputs: tuple[str, ...] = ("system",)
    predicts_tokens = False
    has_step_statistics = True
    has_row_loss = False
    continues_text = True
    rates_answers = True
    free_prompt = True
    is_conversational = True

    def matches(self, recipe: Recipe) -> bool:
        """Whether a model is trained that answers."""
        return section_of(recipe).loss != "reward"

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Put the section's defaults in where the recipe has none.

        Raises DataError where no training row is of the kind that the loss learns from; `encode` refuses single ones.
        """
        section = section_of(recipe)
        columns = answer_columns(section.loss)
        first: str | None = None
        for origin, row in iterate_rows(rows, "train"):
            if all(name in row for name in columns):
                break
            first = first or origin
        else:
            if first is not None:
                raise other_rows(section.loss, first)
        return recipe.model_copy(update={"preference": section})

    def needs_reference_model(self, recipe: Recipe) -> bool:
        """Whether the loss compares with the model as it was."""
        return section_of(recipe).loss in ("dpo", "ipo", "kto")

    def make_row(self, given: Mapping[str, str | None]) -> Row:
        """Return the conversation of one question, after a system message if one was given."""
        return {"messages": question_messages(given)}

    def split_answer(self, row: Row) -> tuple[Row, str]:
        """Return the row itself, whose answers are judged and not written, and the better of them."""
        return row, row.get("chosen") or row.get("answer") or ""

    def reference(self, row: Row) -> bool:
        """Return the thumb, or that the first answer is the better one."""
        return bool(row.get("good", True))

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example a row: the prompt with the chosen answer and with the rejected one."""
        return encode_preference(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what pads answers: the chosen ones and then the rejected, or single ones with those of others."""
        return preference_collator(processor, recipe)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Return the summed loss over pairs (KTO: answers), and their count."""
        return preference_loss(model, batch, batch["settings"], partial(reference_of, model))

    def step_statistics(self, model: torch.nn.Module, batch: Batch) -> list[float]:
        """Return what the loss of KTO and ORPO has to know of a whole step."""
        return survey(model, batch, batch["settings"], partial(reference_of, model))

    def highlighted_text(
        self, example: Example, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[tuple[str, bool]]:
        """Show a prompt with both answers."""
        return preference_pieces(example, processor, recipe)

    def prompt_ids(self, row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids to write an answer from."""
        return render_preference(row, processor, recipe)

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[Row],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[Ratings]:
        """Return the log-probabilities of each row's answers, or their scores."""
        return predict_preferences(model, rows, processor, recipe, device=device, advance=advance)

    def format_prediction(self, prediction: Ratings) -> str:
        """Write what a model makes of a row's answers."""
        names = ("chosen", "rejected", "answer")
        return ", ".join(f"{name} {prediction[name]:.4g}" for name in names if name in prediction)

    def compute_metric(
        self,
        metric: str,
        predictions: Sequence[Ratings],
        references: Sequence[bool],
        recipe: Recipe,
        base: Sequence[Ratings] | None = None,
    ) -> Measure | None:
        """Measure what is made of the answers, against the untuned model where the loss is."""
        return measure_preferences(metric, predictions, references, section_of(recipe), base)


class RewardModel(Preference):
    """A model with one output that scores answers."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    required_inputs = ("prompt", "answer")
    optional_inputs = ()
    has_step_statistics = False
    trains_head = True
    continues_text = False
    free_prompt = False

    def matches(self, recipe: Recipe) -> bool:
        """Whether a model is trained that scores answers."""
        return section_of(recipe).loss == "reward"

    def needs_reference_model(self, recipe: Recipe) -> bool:
        """Scores are compared with nothing."""
        return False

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Give the head one output."""
        name_outputs(config, ("reward",), None)

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Give a decoder the token that rows are padded with."""
        check_padding(model, processor, recipe)

    def make_row(self, given: Mapping[str, str | None]) -> Row:
        """Return the row of a prompt with the answer to be scored."""
        return {**super().make_row(given), "answer": given.get("answer") or ""}

    def baseline(self, references: Sequence[bool], prompts: Sequence[Row], recipe: Recipe) -> tuple[str, list[Ratings]]:
        """Score every answer the same."""
        names = ("chosen", "rejected")
        return "the same score for every answer", [{name: 0.0 for name in names if name in row} for row in prompts]

    def output_kind(self, recipe: Recipe) -> str:
        """Return what the head's output is."""
        return "number"


def section_of(recipe: Recipe) -> PreferenceSection:
    """Return the recipe's section, or its defaults."""
    return recipe.preference or PreferenceSection()


def other_rows(loss: str, origin: str) -> LlmtuneError:
    """Return the error of rows and loss that do not go together."""
    there, others = ("dpo", "dpo, ipo, orpo or reward") if loss == "kto" else ("kto", "kto")
    what = f"preference.loss: {loss} learns from {describe_rows(loss)}, and the rows are {describe_rows(there)}"
    return DataError.of(what, origin, f"Set preference.loss to {others}, or give other rows.")


VARIANTS = (Preference(), RewardModel())
