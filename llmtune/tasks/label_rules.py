"""The rules of tasks for the labels of rows; `recipes check` and `init` import them without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmtune.recipe.schema import Recipe
from llmtune.tasks import class_labels

LABEL_CHECKS: Mapping[str, Callable[[Recipe, Sequence[Any]], None]] = {"classify": class_labels.check_stated_labels}
"""By task, the function that raises DataError or RecipeError for labels of all rows that training would refuse."""
LABEL_METRICS: Mapping[str, Callable[[Sequence[Any]], tuple[str, ...] | None]] = {
    "classify": class_labels.number_metrics
}
"""By task, the function that returns the metrics that the labels need instead of the task's; None without such."""
