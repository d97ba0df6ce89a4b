"""Type checks of the Python API's arguments, before any work; one error names every wrong argument."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llmtune.errors import Problem, RecipeError, nearest, visible
from llmtune.recipe.section import Positive
from llmtune.records import Until

SHOWN = 60
"""Maximum characters of a wrong value in a message."""


class RunArguments(TypedDict):
    """The arguments of `llmtune.run`."""

    recipe: str | Path
    out: str | Path | None
    set: Mapping[str, object] | None
    until: Until
    processes: int
    strategy: str
    resume: bool
    fresh: bool
    lock: str | Path | None
    threads: Positive | None
    offline: bool
    quiet: bool


class LoadArguments(TypedDict):
    """The arguments of `llmtune.load_run`."""

    folder: str | Path
    offline: bool


class GenerateArguments(TypedDict):
    """The arguments of a finished run's `generate`."""

    prompt: str | None
    system: str | None
    context: str | None
    pair: str | None
    audio: str | Path | None
    answer: str | None
    base: bool
    max_new_tokens: Positive | None


class AnswerArguments(TypedDict):
    """The arguments of a finished run's `answer`."""

    inputs: str | Mapping[str, str | Path | list[str] | tuple[str, ...] | None]
    base: bool
    max_new_tokens: Positive | None


SHAPES: dict[str, type[Any]] = {
    "llmtune.run": RunArguments,
    "llmtune.load_run": LoadArguments,
    "run.generate": GenerateArguments,
    "run.answer": AnswerArguments,
}


def check_arguments(function: str, given: Mapping[str, object]) -> None:
    """Raise RecipeError with every argument of a function in SHAPES that has the wrong type."""
    shape = SHAPES[function]
    arguments = {name: given[name] for name in shape.__annotations__}
    try:
        TypeAdapter(shape).validate_python(arguments, strict=True)
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for one in error.errors(include_url=False):
            messages.setdefault(str(one["loc"][0]), []).append(one["msg"].removeprefix("Input should be "))
        RecipeError.collect(
            Problem(
                f"{visible(repr(arguments[name]))[:SHOWN]} ({type(arguments[name]).__name__}) has the wrong type",
                f"{function}({name}=...)",
                f"Pass {' or '.join(dict.fromkeys(wanted))}.{_nearest(name, arguments[name])}",
            )
            for name, wanted in messages.items()
        )


def _nearest(name: str, value: object) -> str:
    return nearest(value, get_args(Until)) if name == "until" and isinstance(value, str) else ""
