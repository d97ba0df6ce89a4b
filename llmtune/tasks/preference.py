"""Task preference: learn from pairs of a better and a worse answer, or from thumbs; or train a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.reference_model import reference_of
from llmtune.data.chat_template import render_prompt
from llmtune.data.classify_rows import format_label
from llmtune.data.collators import collate_padded
from llmtune.data.completion_encoding import prompt_ids
from llmtune.data.example import Example
from llmtune.data.row_store import iterate_rows
from llmtune.data.task_interface import Encoded
from llmtune.data.tokenization import Segment, decode, highlight
from llmtune.errors import DataError, LlmtuneError, Problem
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model.causal_lm_loss import move_to, unwrap
from llmtune.model.config import name_outputs, set_padding
from llmtune.model.device import in_own_dtype
from llmtune.recipe.model_kind import CAUSAL, CLASSES
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import PreferenceSection
from llmtune.records import Batch, Loss, Row, Rows
from llmtune.tasks.base import Endpoint, Task
from llmtune.tasks.chat import question_messages
from llmtune.tasks.preference_encoding import encode_answers, encode_mismatched, encode_whole, training_row
from llmtune.tasks.preference_losses import (
    kl_per_token,
    preference_loss,
    prompt_positions,
    row_scores,
    sequence_logps,
    step_statistics,
)
from llmtune.tasks.preference_metrics import Ratings, measure_preferences
from llmtune.train.objective import SharedStatistics, StepObjective, SummedLoss


@dataclass(frozen=True)
class PreferenceExample(Example):
    """A prompt with an answer, and with a second one."""

    rejected_ids: Sequence[int] = ()
    """The prompt with the rejected answer; `input_ids` has the chosen one."""
    rejected_spans: Sequence[int] = ()
    """The answer in `rejected_ids`, as in `spans`."""
    mismatched_ids: Sequence[int] = ()
    """KTO: the prompt with the answer to another prompt."""
    mismatched_spans: Sequence[int] = ()
    """KTO: the answer in `mismatched_ids`, as in `spans`."""
    desirable: Sequence[int] = ()
    """KTO: 1 for a liked answer, 0 for a disliked one."""

    @property
    def sequences(self) -> list[tuple[Sequence[int], Sequence[int]]]:
        """The prompt with each answer."""
        seconds = (self.rejected_ids, self.rejected_spans), (self.mismatched_ids, self.mismatched_spans)
        return [*super().sequences, *seconds]


class Preference(Task[Row, Ratings]):
    """A decoder that learns which answers to prefer, and writes answers."""

    name = "preference"
    endpoint = Endpoint(
        "/v1/score", "the score: of two answers to one question, the higher is the better", prompt_field="prompt"
    )
    model_kind = CAUSAL
    example_type = PreferenceExample
    optional_inputs: tuple[str, ...] = ("system",)
    has_row_loss = False
    rates_answers = True
    free_prompt = True
    is_conversational = True
    adapter_metrics = ("kl",)

    def matches(self, recipe: Recipe) -> bool:
        """Whether the recipe trains a model that writes answers."""
        return not recipe.variant.is_reward

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Fill in the section's defaults.

        Raises DataError if no training row is of the kind that the loss learns from; `encode` refuses single rows.
        """
        section = preference_section(recipe)
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
        """Whether the loss compares with the original model."""
        return preference_section(recipe).loss in ("dpo", "ipo", "kto")

    def make_row(self, given: Mapping[str, str | None]) -> Row:
        """Return a conversation of one question, after the system message if given."""
        return {"messages": question_messages(given)}

    def split_answer(self, row: Row) -> tuple[Row, str]:
        """Return the row itself, because its answers are rated, not generated, and the better answer."""
        return row, row.get("chosen") or row.get("answer") or ""

    def can_answer(self, row: Row, processor: PreTrainedTokenizerBase) -> bool:
        """Return whether a row has two answers to judge."""
        return "chosen" in row

    def reference(self, row: Row) -> bool:
        """Return the thumb; for pairs True, because the first answer is the better one."""
        return bool(row.get("good", True))

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example per row: the prompt with the chosen and the rejected answer, both answers supervised.

        For KTO: the prompt with its answer, and with the answer to another row. The second serves to estimate the KL
        divergence. It is cut at `data.max_length`, so no row is lost because of another row's answer.
        """
        loss = preference_section(recipe).loss
        columns = answer_columns(loss)
        usable = [row for row in rows if all(name in row for name in columns)]
        if loss == "kto":
            answers = [row["answer"] for row in usable]
            left = encode_answers(usable, answers, processor, recipe)
            right = encode_mismatched(usable, answers, processor, recipe)
        else:
            left, right = (encode_answers(usable, [row[name] for row in usable], processor, recipe) for name in columns)
        joined = iter([join_answers(row, one, other) for row, one, other in zip(usable, left, right, strict=True)])
        wrong = f"preference.loss: {loss} learns from {describe_rows(loss)}"
        return [next(joined) if all(name in row for name in columns) else wrong for row in rows]

    def collate(
        self,
        examples: Sequence[PreferenceExample],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        packs: bool,
        draw: int,
    ) -> Batch:
        """Pad answers: first the chosen, then the rejected; or (KTO) single answers, and other rows' answers as `kl_*`.

        The thumbs are `desirable_R` bool [R]; `settings` configures the loss.
        """
        section, pad_id = preference_section(recipe), processor.pad_token_id
        if section.loss == "kto":
            batch = collate_padded(examples, pad_id)
            mismatched = [Example(example.mismatched_ids, example.mismatched_spans, 0) for example in examples]
            batch |= {f"kl_{name}": part for name, part in collate_padded(mismatched, pad_id).items()}
            batch["desirable_R"] = torch.tensor([example.desirable[0] > 0 for example in examples])
        else:
            rejected = [Example(example.rejected_ids, example.rejected_spans, 0) for example in examples]
            batch = collate_padded([*examples, *rejected], pad_id)
        if section.loss == "orpo":
            batch["prompts_S"] = prompt_positions(batch)
        return batch | {"settings": section, "pairs": len(examples)}

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Return the summed loss over pairs (KTO: over answers), and their count."""
        return preference_loss(model, batch, batch["settings"], partial(reference_of, model))

    def objective(self, recipe: Recipe) -> StepObjective:
        """Return an objective that sums losses; those of KTO and ORPO need statistics of the complete step."""
        shares = preference_section(recipe).loss in ("kto", "orpo")
        return SharedStatistics(self.loss, self.step_statistics) if shares else SummedLoss(self.loss)

    def step_statistics(self, model: torch.nn.Module, batch: Batch) -> list[float]:
        """Return the sums over a complete step that the losses of KTO and ORPO need."""
        return step_statistics(model, batch, batch["settings"], partial(reference_of, model))

    def highlighted_text(
        self, example: PreferenceExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show a prompt with both answers."""
        one, other = (highlight(ids, spans, processor) for ids, spans in example.sequences if len(ids))
        return [*one, Segment("\n--- versus ---\n", False), *other]

    def prompt_ids(self, row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids of the prompt for an answer."""
        if processor.chat_template:
            return render_prompt(row["messages"], processor, recipe, tools=row.get("tools"))
        return prompt_ids(training_row(row, "", processor)["prompt"], processor)

    def predict(self, rows: Sequence[Row], loaded: LoadedModel) -> list[Ratings]:
        """Return the log-probabilities of a row's answers (`chosen`, `rejected` or `answer`), or their scores.

        For log-probabilities, `*_tokens` has the number of tokens. `kl` is the divergence from the model without its
        adapter on the first answer, in nats per token; omitted if the adapter does not contain every trained weight.
        Raises DataError for a row that cannot be encoded.
        """
        model, processor, recipe = loaded.model, loaded.processor, loaded.recipe
        scoring = recipe.variant.is_reward
        single = preference_section(recipe).loss == "kto" or (scoring and all("answer" in row for row in rows))
        names = ("answer",) if single else ("chosen", "rejected")
        if single:
            encoded = encode_answers(rows, [row["answer"] for row in rows], processor, recipe)
        else:
            encoded = self.encode(rows, processor, recipe)
        refused = ((i, reason) for i, reason in enumerate(encoded, 1) if isinstance(reason, str))
        DataError.collect(Problem(reason, f"row {i} of the request") for i, reason in refused)
        examples = [parts[0] for parts in encoded if not isinstance(parts, str)]
        collate_pairs = self.collator(processor, recipe)

        def collate(batch: list[int], first_only: bool) -> Batch:
            chosen = [examples[i] for i in batch]
            padded = collate_padded(chosen, processor.pad_token_id) if first_only else collate_pairs(chosen, 0)
            return move_to(loaded.device, padded)

        def work(batch: list[int]) -> list[Ratings]:
            tensors = collate(batch, single)
            if scoring:
                values = {"": row_scores(model, tensors)}
            else:
                logps_R, counts_R = sequence_logps(model, tensors)
                values = {"": logps_R, "_tokens": counts_R}
            columns = {
                f"{name}{what}": values_R[k * len(batch) : (k + 1) * len(batch)].tolist()
                for what, values_R in values.items()
                for k, name in enumerate(names)
            }
            if "kl" not in recipe.variant.unmeasured:
                columns["kl"] = kl_per_token(model, tensors if single else collate(batch, True))
            return [{name: float(column[row]) for name, column in columns.items()} for row in range(len(batch))]

        unwrap(model).eval()
        lengths = [example.tokens for example in examples]
        return run_in_batches(lengths, budget_for(loaded.device, TOKEN_BUDGET), work, loaded.advance)

    def format_prediction(self, prediction: Ratings) -> str:
        """Write the ratings of a row's answers."""
        names = ("chosen", "rejected", "answer")
        return ", ".join(f"{name} {format_label(prediction[name])}" for name in names if name in prediction)

    def compute_metric(self, metric: str, output: EvalPrediction[Ratings], recipe: Recipe) -> Measure | None:
        """Measure the ratings of answers, relative to the untuned model if the loss is."""
        return measure_preferences(
            metric, output.predictions, output.references, preference_section(recipe), output.base
        )


class RewardModel(Preference):
    """A reward model: one output that scores an answer."""

    model_kind = CLASSES
    required_inputs = ("prompt", "answer")
    optional_inputs = ()
    free_prompt = False

    def matches(self, recipe: Recipe) -> bool:
        """Whether the recipe trains a reward model."""
        return recipe.variant.is_reward

    def needs_float32(self, recipe: Recipe) -> bool:
        """Return True: scores rank answers."""
        return True

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Return the summed loss over pairs; outside training, of the scores that `predict` has."""
        with nullcontext() if model.training else in_own_dtype(model, batch["input_ids"].device.type):
            return super().loss(model, batch, by_row)

    def predict(self, rows: Sequence[Row], loaded: LoadedModel) -> list[Ratings]:
        """Return the scores of a row's answers."""
        with in_own_dtype(loaded.model, loaded.device):
            return super().predict(rows, loaded)

    def needs_reference_model(self, recipe: Recipe) -> bool:
        """Return False: scores need no reference."""
        return False

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Give the head one output."""
        name_outputs(config, ("reward",), None)

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Set the token that a decoder's rows are padded with."""
        set_padding(model, processor)

    def count_tokens(self, row: Row, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int) -> int:
        """Return the tokens of prompt and answer; 0 for a row that cannot be encoded, which `predict` refuses."""
        (encoded,) = encode_whole([row], [row["answer"]], processor, recipe)
        return 0 if isinstance(encoded, str) else len(encoded[0].input_ids)

    def cuts_texts(self, recipe: Recipe) -> bool:
        """Return False: the answer is at the end."""
        return False

    def make_row(self, given: Mapping[str, str | None]) -> Row:
        """Return the row of a prompt with the answer to score."""
        return {**super().make_row(given), "answer": given.get("answer") or ""}

    def export_constants(self, recipe: Recipe, processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the conversation that the model reads, with places for the prompt and the answer."""
        places = {name: f"<{name}>" for name in self.required_inputs}
        (encoded,) = encode_whole([self.make_row(places)], [places["answer"]], processor, recipe)
        assert not isinstance(encoded, str), "a row of any length"
        return {"prompt": decode(processor, encoded[0].input_ids), "places": [*places.values()]}

    def baseline(self, references: Sequence[bool], prompts: Sequence[Row], recipe: Recipe) -> tuple[str, list[Ratings]]:
        """Score every answer the same."""
        names = ("chosen", "rejected")
        return "the same score for every answer", [{name: 0.0 for name in names if name in row} for row in prompts]

    def output_kind(self, recipe: Recipe) -> str:
        """Return the kind of the head's output."""
        return "number"


def preference_section(recipe: Recipe) -> PreferenceSection:
    """Return the recipe's section, or its defaults."""
    return recipe.preference or PreferenceSection()


def answer_columns(loss: str) -> tuple[str, ...]:
    """Return the columns that a row needs for this loss, in addition to its prompt."""
    return ("answer",) if loss == "kto" else ("chosen", "rejected")


def describe_rows(loss: str) -> str:
    """Return the kind of rows that a loss learns from, in words."""
    return "single answers with a thumb" if loss == "kto" else "pairs of a chosen and a rejected answer"


def other_rows(loss: str, origin: str) -> LlmtuneError:
    """Return the error for rows that do not match the loss."""
    there, others = ("dpo", "dpo, ipo, orpo or reward") if loss == "kto" else ("kto", "kto")
    what = f"preference.loss: {loss} learns from {describe_rows(loss)}, and the rows are {describe_rows(there)}"
    return DataError.of(what, origin, f"Set preference.loss to {others}, or give other rows.")


def join_answers(row: Row, left: Encoded, right: Encoded) -> Encoded:
    """Join the examples of a prompt with one answer and with another."""
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else right
    (one,), (other,) = left, right
    if "chosen" in row and list(one.input_ids) == list(other.input_ids):
        return "chosen equals rejected: both answers have the same tokens"
    one = replace(one, counted=1, cost=len(one.input_ids) + len(other.input_ids))
    if "good" not in row:
        return [PreferenceExample(**vars(one), rejected_ids=other.input_ids, rejected_spans=other.spans)]
    ids, spans, desirable = other.input_ids, other.spans, [int(row["good"])]
    return [PreferenceExample(**vars(one), mismatched_ids=ids, mismatched_spans=spans, desirable=desirable)]


VARIANTS = (Preference(), RewardModel())
