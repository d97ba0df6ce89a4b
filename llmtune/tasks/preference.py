"""Task preference: learn from pairs of a better and a worse answer, or from thumbs; or train a model that scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llmtune.adapter.reference_model import reference_of
from llmtune.data import iterate_rows
from llmtune.data.data_report import preference_pieces
from llmtune.data.preference_encoding import answer_columns, describe_rows, encode_preference, render_preference
from llmtune.data.target_collators import preference_collator
from llmtune.errors import DataError, LlmtuneError
from llmtune.evaluate.metrics import Measure
from llmtune.evaluate.preference_metrics import measure_preferences, predict_preferences
from llmtune.model.heads import check_padding, name_outputs
from llmtune.model.preference_losses import preference_loss
from llmtune.model.preference_losses import survey as survey_of
from llmtune.recipe import PreferenceSection
from llmtune.records import Batch, Loss, Row, Rows, Task

if TYPE_CHECKING:
    from llmtune.recipe import Recipe


def section(recipe: Recipe) -> PreferenceSection:
    """Return the recipe's section, or its defaults."""
    return recipe.preference or PreferenceSection()


def loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Return the summed loss over pairs (KTO: answers), and their count."""
    return preference_loss(model, batch, batch["settings"], partial(reference_of, model))


def survey(model: torch.nn.Module, batch: Batch) -> list[float]:
    """Return what the loss of KTO and ORPO has to know of a whole step."""
    return survey_of(model, batch, batch["settings"], partial(reference_of, model))


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row itself, whose answers are judged and not written, and the better of them."""
    return row, row.get("chosen") or row.get("answer") or ""


def reference(row: Row) -> Any:
    """Return the thumb, or that the first answer is the better one."""
    return row.get("good", True)


def write(said: Any) -> str:
    """Write what a model makes of a row's answers."""
    return ", ".join(f"{name} {said[name]:.4g}" for name in ("chosen", "rejected", "answer") if name in said)


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a prompt; for a model that scores, with the answer to be scored."""
    messages = [{"role": "user", "content": given["prompt"] or ""}]
    return {"messages": messages, "answer": given.get("answer") or ""}


def settle(recipe: Recipe, rows: Rows, config: Any) -> Recipe:
    """Put the section's defaults in where the recipe has none.

    Raises DataError where no training row is of the kind that the loss learns from; single ones are told by `encode`.
    """
    own = section(recipe)
    columns = answer_columns(own.loss)
    first: str | None = None
    for origin, row in iterate_rows(rows, "train"):
        if all(name in row for name in columns):
            break
        first = first or origin
    else:
        if first is not None:
            raise other_rows(own.loss, first)
    return recipe.model_copy(update={"preference": own})


def other_rows(loss: str, origin: str) -> LlmtuneError:
    """Say that rows and loss do not go together."""
    there, others = ("dpo", "dpo, ipo, orpo or reward") if loss == "kto" else ("kto", "kto")
    what = f"preference.loss: {loss} learns from {describe_rows(loss)}, and the rows are {describe_rows(there)}"
    return DataError.of(what, origin, f"Set preference.loss to {others}, or give other rows.")


def measure(
    metric: str, said: Sequence[Any], wanted: Sequence[Any], recipe: Recipe, base: Sequence[Any] | None = None
) -> Measure | None:
    """Measure what is made of the answers, against the untuned model where the loss is."""
    return measure_preferences(metric, said, wanted, section(recipe), base)


def scores_answers(recipe: Recipe) -> bool:
    """Whether a model is trained that scores answers."""
    return section(recipe).loss == "reward"


def one_score(config: Any, recipe: Recipe) -> None:
    """Tell the model that its head has one output."""
    name_outputs(config, ("reward",), None)


def baseline(learned: Sequence[Any], questions: Sequence[Row], recipe: Recipe) -> tuple[str, list[Any]]:
    """Score every answer the same."""
    names = ("chosen", "rejected")
    return "the same score for every answer", [{name: 0.0 for name in names if name in row} for row in questions]


PREFERENCE = Task(
    name="preference",
    auto_class="AutoModelForCausalLM",
    peft_task_type="CAUSAL_LM",
    encode=encode_preference,
    collator=preference_collator,
    loss=loss,
    prompt=prompt,
    predict=predict_preferences,
    render=render_preference,
    measure=measure,
    reference=reference,
    write=write,
    ask=ask,
    asks={"prompt": True, "system": False},
    settle=settle,
    pieces=preference_pieces,
    survey=survey,
    scores_rows=False,
    admits=lambda recipe: not scores_answers(recipe),
    compares=lambda recipe: section(recipe).loss in ("dpo", "ipo", "kto"),
    by_token=False,
)
REWARD = replace(
    PREFERENCE,
    auto_class="AutoModelForSequenceClassification",
    peft_task_type="SEQ_CLS",
    render=None,
    asks={"prompt": True, "answer": True},
    survey=None,
    baseline=baseline,
    shape_config=one_score,
    check=check_padding,
    admits=scores_answers,
    compares=lambda recipe: False,
    headed=True,
)
FORMS = (PREFERENCE, REWARD)
