"""Checks of a recipe's rewards, and of the rows for them, before training. Imports no model."""

from __future__ import annotations

from collections.abc import Iterable

from llmtune.errors import DataError, Problem
from llmtune.evaluate.rewards import find_lack, list_rewards, read_reward
from llmtune.recipe.schema import Recipe
from llmtune.records import Row


def require_rewards(recipe: Recipe) -> None:
    """Refuse rewards and audits that are unknown or cannot be called. Raises one RecipeError for all."""
    if recipe.reinforce:
        list_rewards(recipe.reinforce)


def check_rewarded_rows(recipe: Recipe, rows: Iterable[tuple[str, Row]]) -> None:
    """Refuse rows, each with its origin, that lack the reference answer or the column that a reward needs.

    Raises one DataError for all rewards, each with its first such row.
    """
    unchecked, problems = [read_reward(one, 1.0) for one in recipe.variant.rewards], list[Problem]()
    for origin, row in rows if unchecked else ():
        found = {reward.name: problem for reward in unchecked if (problem := find_lack(reward, origin, row))}
        problems += found.values()
        unchecked = [reward for reward in unchecked if reward.name not in found]
        if not unchecked:
            break
    DataError.collect(problems)
