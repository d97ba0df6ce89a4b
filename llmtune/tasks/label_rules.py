"""The rules of tasks for the labels of rows; `recipes check` and `init` import them without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.recipe.schema import Recipe
from llmtune.tasks import class_labels


@dataclass(frozen=True)
class LabelRules:
    """What a task knows about all labels of a data set, without a model."""

    check: Callable[[Recipe, Sequence[Any]], None]
    """Raises DataError or RecipeError for labels that training would refuse."""
    metrics: Callable[[Sequence[Any]], tuple[str, ...] | None]
    """Returns the metrics that the labels need instead of the task's; None without such."""


LABEL_RULES = {"classify": LabelRules(class_labels.check_stated_labels, class_labels.number_metrics)}
"""By task."""
