"""Commands with hostile input must end in time, with one of our exit codes and no control codes in the output."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from typer.testing import CliRunner, Result

import llmtune.pipeline  # noqa: F401 - keeps the imports out of the commands' times
from llmtune.cli.app import app
from llmtune.errors import STEERING
from support.runs import write_recipe

SECONDS = 10


class TooLateError(BaseException):
    """A command that did not end in time; llmtune does not catch this error."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooLateError


@dataclass(frozen=True)
class Attempt:
    """How a command ended."""

    code: int
    said: str
    error: object = None


def attempt(*arguments: object, code: int | tuple[int, ...], seconds: float = SECONDS) -> str:
    """Run a command and return its output; `code` is the expected exit code."""
    found = RUNNERS[-1]([str(argument) for argument in arguments], seconds)
    assert found.code in (code if isinstance(code, tuple) else (code,)), (found.said, found.error)
    assert "Traceback" not in found.said
    assert not STEERING.search(found.said.replace("\r", "")), found.said
    return " ".join(found.said.split())


def run_here(arguments: Sequence[str], seconds: float) -> Attempt:
    """Run a command in this process, with a time limit."""
    handler = signal.signal(signal.SIGALRM, _stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        result: Result = CliRunner().invoke(app, list(arguments))
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
    return Attempt(result.exit_code, result.stderr, result.exception)


RUNNERS: list[Callable[[Sequence[str], float], Attempt]] = [run_here]
"""The last one runs commands: in this process, or measured in their own processes."""


def prepare(rows: Path | str, *, code: int | tuple[int, ...], task: str = "chat", **source: object) -> str:
    """Read rows with `llmtune prepare`, as far as possible without a model; `source` adds to the recipe's source."""
    shutil.rmtree("run", ignore_errors=True)
    model = {"name": None, "candidates": ["builtin:one", "builtin:two"]}
    data = {"train": {"path": str(rows), **source}}
    write_recipe(Path("hostile.yaml"), "none", rows, task=task, model=model, data=data, evaluate={"metrics": ["loss"]})
    return attempt("prepare", "hostile.yaml", "--out", "run", code=code)
