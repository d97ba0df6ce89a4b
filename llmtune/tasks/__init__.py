"""The table of tasks: each is a `Task` put together, in a file of its own, from functions of the packages below."""

from __future__ import annotations

from llmtune.errors import RecipeError, nearest
from llmtune.records import Task
from llmtune.tasks.chat import CHAT
from llmtune.tasks.completion import COMPLETION

__all__ = ["TASKS", "get_task"]

TASKS: dict[str, Task] = {task.name: task for task in (CHAT, COMPLETION)}


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        RecipeError: there is none.
    """
    if name not in TASKS:
        known = tuple(TASKS)
        raise RecipeError.of(
            f"unknown task {name!r}.{nearest(name, known)}", where="task", fix=f"Choose one of: {', '.join(known)}."
        )
    return TASKS[name]
