"""Where output goes: progress and messages to stderr, one JSON document to stdout; errors become exit codes."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from llmtune.errors import LlmtuneError
from llmtune.launch.python_api import make_console
from llmtune.store.atomic_files import plain

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
RUN_PARAMETERS = {"run", "runs", "what"}
"""Parameters of commands that name runs."""
SHOWN_PROBLEMS = 30
"""More than the twenty bad rows that are named, with what is said before and after them."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived where no checkpoint can be written."""


def stderr_console(*, quiet: bool = False) -> Console:
    """Return where people read."""
    return make_console(quiet=quiet)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))


def handled(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors that a user can meet into a message on stderr and an exit code; bugs pass through."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        as_json = bool(kwargs.get("as_json"))
        try:
            for name in RUN_PARAMETERS & kwargs.keys():
                if kwargs[name] is not None:  # `explain positions` goes without one
                    kwargs[name] = _resolve_runs(kwargs[name])
            command(*args, **kwargs)
        except LlmtuneError as error:
            _print_error(error, as_json)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            word = "terminated" if number == signal.SIGTERM else "interrupted"
            kept = "; finished steps are kept. To go on, run the same command again." if "recipe" in kwargs else ""
            stderr_console().print(f"{word}{kept}")
            raise typer.Exit(128 + number) from None

    return wrapper


def _resolve_runs(value: Any) -> Any:
    """Put folders in the place of names of runs; a Path must be one."""
    from llmtune.store.run_listing import find_run, match_run

    if isinstance(value, list):
        return [type(one)(match_run(str(one)) or one) for one in value]
    return find_run(value) if isinstance(value, Path) else str(match_run(value) or value)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _print_error(error: LlmtuneError, as_json: bool) -> None:
    from rich.markup import escape

    console = stderr_console()
    for problem in error.problems[:SHOWN_PROBLEMS]:
        place = f"[bold]{escape(problem.where)}[/]: " if problem.where else ""
        console.print(f"[bold red]error[/] {place}{escape(problem.what)}")
        if problem.fix:
            console.print(f"  [green]->[/] {escape(problem.fix)}")
    if len(error.problems) > SHOWN_PROBLEMS:
        console.print(f"and {len(error.problems) - SHOWN_PROBLEMS} more")
    if as_json:
        problems = [{"what": p.what, "where": p.where, "fix": p.fix} for p in error.problems]
        print_json({"error": {"exit_code": error.exit_code, "problems": problems}})
