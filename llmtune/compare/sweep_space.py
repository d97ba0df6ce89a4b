"""The search space of a sweep: keys of the recipe, each with the values that it may take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import Problem, RecipeError, nearest
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.recipe.validation import key_paths
from llmtune.recipe.yaml_reader import Node, file_label, parse_yaml, read_recipe_text
from llmtune.recipe.yaml_writer import scalar

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

SEARCHED = ("adapter.", "train.", "preference.")
"""Sections whose keys leave the rows, and so the validation loss of each trial, comparable."""
KEPT = frozenset(
    {
        "train.eval_metrics",
        "train.metric_for_best_model",
        "train.seeds",
        "train.report_to",
        "train.logging_steps",
        "train.save_total_limit",
        "train.save_steps",
    }
)
EXAMPLE = "Write e.g. `train.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}` or `adapter.r: [8, 16, 32]`."
PARTS = ("low", "high", "log", "step")


def read_space(file: Path, recipe: str, sets: Sequence[str]) -> dict[str, BaseDistribution]:
    """Read a space; raises RecipeError with all that is wrong with it, values that the recipe refuses among it."""
    root = parse_yaml(read_recipe_text(file), file_label(file), file.parent)
    if not isinstance(root.value, dict) or not root.value:
        raise RecipeError.of("a search space is a mapping of a recipe's keys", file_label(file), EXAMPLE)
    space, problems = {}, []
    for key, node in root.value.items():
        try:
            space[key] = _distribution(key, node)
            for value in _ends(space[key]):
                load_recipe(recipe, [*sets, f"{key}={scalar(value)}"])
        except RecipeError as error:
            problems += [Problem(one.what, node.origin, one.fix) for one in error.problems]
    RecipeError.collect(dict.fromkeys(problems))
    return space


def _distribution(key: str, node: Node) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    known = [path for path in key_paths() if path.startswith(SEARCHED) and path not in KEPT]
    if key not in known:
        fix = f"{nearest(key, known)} Keys of adapter, train and preference can be searched: rows stay as they are."
        raise RecipeError.of(f"'{key}' cannot be searched", node.origin, fix.strip())
    value: Any = node.plain()
    if isinstance(value, list) and len(value) > 1 and not any(isinstance(one, list | dict) for one in value):
        return CategoricalDistribution(value)
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= set(PARTS):
        raise RecipeError.of(f"'{key}' has {scalar(value)} for values", node.origin, EXAMPLE)
    low, high, log, step = (value.get(name) for name in PARTS)
    numbers = [one for one in (low, high) if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)) or numbers[0] >= numbers[1]:
        raise RecipeError.of(f"'{key}' goes from {scalar(low)} to {scalar(high)}", node.origin, EXAMPLE)
    whole = all(isinstance(one, int) for one in numbers)
    if step is not None and not (
        isinstance(step, int if whole else int | float) and 0 < step <= numbers[1] - numbers[0]
    ):
        fix = "Write a number above 0 and at most `high` - `low`, whole if they are."
        raise RecipeError.of(f"'{key}' has {scalar(step)} for its step", node.origin, fix)
    if not isinstance(log, bool | None):
        raise RecipeError.of(f"'{key}' has {scalar(log)} for log", node.origin, "Write `log: true` or omit it.")
    if log and (numbers[0] <= 0 or step is not None):
        raise RecipeError.of(f"'{key}' is logarithmic, which needs low above 0 and no step", node.origin, EXAMPLE)
    if whole:
        return IntDistribution(int(numbers[0]), int(numbers[1]), log=bool(log), step=step or 1)
    return FloatDistribution(float(numbers[0]), float(numbers[1]), log=bool(log), step=step)


def _ends(distribution: BaseDistribution) -> Sequence[Any]:
    """Return the values that stand for all: every choice, or both ends of a range."""
    choices = getattr(distribution, "choices", None)
    return choices if choices is not None else (distribution.low, distribution.high)  # type: ignore[attr-defined]


def suggest(trial: Trial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Return the values of a trial, those that it has already as they are."""
    return {key: trial._suggest(key, distribution) for key, distribution in space.items()}


def load_with_values(recipe: str, sets: Sequence[str], values: Mapping[str, Any]) -> LoadedRecipe:
    """Load the recipe with the values of a trial. Raises RecipeError where they do not go together."""
    return load_recipe(recipe, [*sets, *(f"{key}={scalar(value)}" for key, value in values.items())])
