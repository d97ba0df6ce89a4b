"""Scores beyond the metrics of a task, a file each: a suite that a section of `evaluate` requests.

A new suite is a subclass of `Suite` in a file of its own, and a line in `suite_registry.SUITES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.evaluate.evaluated_task import EvaluatedTask
    from llmtune.recipe.schema import Recipe
    from llmtune.records import Rows


class Suite:
    """When a suite is requested, and what is checked before training; `EvalSuite` also runs models."""

    key: ClassVar[str]
    """The key of `evaluate` that requests it, and the name of its study."""
    part: ClassVar[str] = ""
    """The key in that section that requests it, if the section has several suites."""

    @classmethod
    def is_requested(cls, recipe: Recipe) -> bool:
        """Whether the recipe has the suite."""
        section = getattr(recipe.evaluate, cls.key)
        return bool(section and (not cls.part or getattr(section, cls.part)))

    @classmethod
    def read(cls, recipe: Recipe) -> object:
        """Read and check the inputs when a run starts.

        Raises:
            DataError: inputs that cannot be read or used.
            EnvironmentProblem: the hub cannot be reached, or a package is missing.
            RecipeError: settings that cannot work.
        """

    @classmethod
    def try_out(cls, recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
        """Refuse, before training, settings that these rows rule out; `recipe` has its labels resolved.

        Raises the errors of `read`.
        """
