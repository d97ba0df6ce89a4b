"""The keys `decide`, `sets` and `out_of_scope` of `evaluate`: which answers to trust, fitted on validation rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from llmtune.recipe.section import RecipeSection
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import CALIBRATION, DECISIONS
from llmtune.recipe.task_variant import TaskVariant

Share = Annotated[float, Field(gt=0, lt=1)]


class DecideSection(RecipeSection):
    """Abstention: decide the confident answers, and ask a person about the others."""

    risk: Share
    """Highest error rate among decided answers, such as 0.05."""
    confidence: Share = 0.95
    """Probability that the validation rows find a threshold that keeps the risk. Default 0.95: one run in 20 may exceed
    it."""


class SetsSection(RecipeSection):
    """Prediction sets: the labels that may be right."""

    coverage: Share
    """Share of new rows whose set has the right label. Of several right labels, the share in the set."""
    per_class: bool = False
    """Whether the coverage holds for each class, not only on average. Default false: rare classes need rows, and make
    sets larger."""


def as_coverage(value: object) -> object:
    """Expand a plain number to its mapping."""
    return {"coverage": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


PredictionSets = Annotated[SetsSection, BeforeValidator(as_coverage, json_schema_input_type=float | SetsSection)]


def check_decisions(
    diagnostics: Diagnostics, used: list[str], variant: TaskVariant, *, has_validation: bool, chooses: bool
) -> None:
    """Report decision keys without effect; `used` are those with a value."""
    for key in (f"evaluate.{name}" for name in used):
        if not has_validation:
            fix = "Set data.validation to a share of the rows: decisions are fitted on them."
            diagnostics.no_effect(key, "without validation rows", fix, "data.validation")
        elif variant.facts.generates and not chooses:
            fix = "Add choice_accuracy to evaluate.metrics, and set evaluate.choices."
            diagnostics.no_effect(key, "without choices", fix, "evaluate.metrics")
        elif not set(CALIBRATION) & set(variant.metrics):
            diagnostics.no_effect(key, f"in task {variant.task}, which does not choose", "Remove it.", "task")
        elif variant.facts.answer_kind == "tags" and key != "evaluate.decide":
            fix = "Remove it; evaluate.decide works for tags."
            diagnostics.no_effect(key, f"in task {variant.task}, which chooses a tag per word", fix, "task")


def key_of_decision(metric: str) -> str | None:
    """Return the recipe key that adds a metric of decisions; None for other metrics."""
    return next((key for key, metrics in DECISIONS.items() if metric in metrics), None)
