"""What the recipe of `llmtune init` has because of its rows and its model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmtune.recipe.model_kind import MASKED, SEQ2SEQ
from llmtune.recipe.task_variant import TaskVariant
from llmtune.recipe.undecided import UNDECIDED
from llmtune.records import Row

TRANSLATORS = {
    r"^T5": ('prompt: "translate English to German: {source}"  # DECIDE: the languages, in words',),
    r"^M2M100|^Nllb": (
        "source_language: eng_Latn  # DECIDE: the source language, by the model's own code",
        "target_language: deu_Latn  # DECIDE: the target language, by the model's own code",
    ),
    r"^MBart": (
        "source_language: en_XX  # DECIDE: the source language, by the model's own code",
        "target_language: de_DE  # DECIDE: the target language, by the model's own code",
    ),
}
"""Classes of encoder-decoders, and the lines that they need; the others know one pair of languages."""


@dataclass(frozen=True)
class FirstSettings:
    """What the first recipe of a task has for some rows or models in place of the usual; None: the usual."""

    metrics: tuple[str, ...] | None = None
    lines: tuple[str, ...] | None = None
    """Lines of the task's own section."""
    generates: bool = True
    """Whether the model writes answers."""


def _for_scores(rows: Sequence[Row], model_class: str) -> FirstSettings:
    is_scored = rows[0]["score"] is not None
    return FirstSettings(("spearman", "pearson", "random_cosine", "effective_rank") if is_scored else None)


def _for_thumbs(rows: Sequence[Row], model_class: str) -> FirstSettings:
    if "chosen" in rows[0]:
        return FirstSettings()
    metrics = TaskVariant("preference", loss="kto").default_metrics
    return FirstSettings(metrics, ("loss: kto  # the rows have thumbs, not pairs of answers",))


def _for_masks(rows: Sequence[Row], model_class: str) -> FirstSettings:
    if not re.search(MASKED.card_pattern, model_class):
        return FirstSettings()
    return FirstSettings(("loss", "accuracy"), ("objective: masked  # the model is an encoder",), generates=False)


def _for_translators(rows: Sequence[Row], model_class: str) -> FirstSettings:
    if not re.search(SEQ2SEQ.card_pattern, model_class):
        return FirstSettings()
    return FirstSettings(lines=next((lines for name, lines in TRANSLATORS.items() if re.search(name, model_class)), ()))


def _for_prompts(rows: Sequence[Row], model_class: str) -> FirstSettings:
    if rows[0]["messages"][-1]["role"] == "assistant":
        return FirstSettings()
    own = "{rewards.py:FUNCTION: 1.0}, your own function: the rows have no reference answers"
    return FirstSettings(lines=(f"rewards: {UNDECIDED}  # {own}",))


FIRST_SETTINGS: Mapping[str, Callable[[Sequence[Row], str], FirstSettings]] = {
    "embed": _for_scores,
    "preference": _for_thumbs,
    "completion": _for_masks,
    "translate": _for_translators,
    "reinforce": _for_prompts,
}
"""By task, the function of canonical rows and the model's class (empty if unknown) for the recipe of `llmtune init`."""
