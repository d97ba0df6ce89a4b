"""Where output goes: progress and messages to stderr, one JSON document to stdout; errors become exit codes."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO

import typer

from llmtune.errors import (
    STEERING,
    EnvironmentProblem,
    GateFailed,
    LlmtuneError,
    Problem,
    RecipeError,
    system_problem,
    visible,
)
from llmtune.launch.python_api import make_console
from llmtune.store.atomic_files import plain
from llmtune.store.processes import join, lost_process, reports, world_size

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
IN_PLACE_OF_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
"""EINVAL is what `user_files.NotAFileError` has."""
RUN_PARAMETERS = {"run", "runs", "what"}
"""Parameters of commands that name runs."""
SHOWN_PROBLEMS = 30
"""More than the twenty bad rows that are named, with the lines before and after them."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived where no checkpoint can be written."""


def stderr_console(*, quiet: bool = False) -> Console:
    """Return where people read."""
    return make_console(quiet=quiet)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    typer.echo(STEERING.sub(_json_escape, text), file=_document[-1] if _document else None)


_document: list[TextIO] = []
"""The standard output of a command with --json, which nothing else writes to."""


@contextmanager
def _document_alone() -> Iterator[None]:
    """Let what libraries print (gptqmodel greets, for one) go to standard error, and the document alone to stdout."""
    _document.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _document.pop()


def _json_escape(found: re.Match[str]) -> str:
    """JSON text holds no lower control characters unescaped: what is left are C1, changes of direction, surrogates."""
    return f"\\u{ord(found[0]):04x}"


def print_text(text: str) -> None:
    """Print text of a model or a recipe on stdout: as it is into a file, and so that it cannot steer a terminal."""
    typer.echo(visible(text) if sys.stdout.isatty() else text, nl=False)


class WordWrap:
    """Breaks lines between words in text that comes in pieces; into a file it goes as it is."""

    def __init__(self, width: int | None = None) -> None:
        self._width = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
        self._column, self._waiting = 0, ""

    def add(self, piece: str) -> str:
        """Return what is certain by now: all but the last word, which may go on."""
        if self._width is None:
            return piece
        *parts, self._waiting = re.findall(r"\s*\S+|\s+\Z", self._waiting + piece) or [""]
        return "".join(map(self._place, parts))

    def rest(self) -> str:
        """Return the last word."""
        part, self._waiting = self._waiting, ""
        return self._place(part)

    def _place(self, part: str) -> str:
        """Return a word with the space before it, or with a line end in its place."""
        width = len(part.expandtabs())
        if "\n" in part:
            self._column = len(part.rpartition("\n")[2])
        elif self._column and self._width is not None and self._column + width > self._width and part[0].isspace():
            part = "\n" + part.lstrip()
            self._column = len(part) - 1
        else:
            self._column += width
        return part


def handled(command: Callable[P, None], *, by_all: bool = False) -> Callable[P, None]:
    """Turn the errors that a user can meet into a message on stderr and an exit code; bugs pass through.

    A command that several processes can run together is handled `by_all`: one of them prints.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        as_json = bool(kwargs.get("as_json"))
        try:
            with _document_alone() if as_json else nullcontext(), _system_refusals():
                _meet(by_all)
                _check_names(kwargs)
                for name in [name for name in RUN_PARAMETERS & kwargs.keys() if kwargs[name] is not None]:
                    kwargs[name] = _resolve_runs(kwargs[name])
                command(*args, **kwargs)
        except LlmtuneError as error:
            if reports(error):
                _print_error(error, as_json)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            word = "terminated" if number == signal.SIGTERM else "interrupted"
            kept = "; finished steps are kept" if "recipe" in kwargs else ""
            kept += ". To go on, run the same command again." if kwargs.keys() & {"recipe", "out"} else ""
            if reports(stop):
                stderr_console().print(f"{word}{kept}")
            raise typer.Exit(128 + number) from None

    return wrapper


handled_by_all = functools.partial(handled, by_all=True)


def _meet(by_all: bool) -> None:
    """Meet the other processes; raises RecipeError where the command is for one alone."""
    join()
    if world_size() > 1 and not by_all:
        raise RecipeError.of("this command runs in one process", "torchrun", "Start it without torchrun.")


def _resolve_runs(value: Any) -> Any:
    """Put folders in the place of names of runs; a Path must be one."""
    from llmtune.store.run_listing import find_run, match_run

    if isinstance(value, list):
        return [type(one)(match_run(str(one)) or one) for one in value]
    return find_run(value) if isinstance(value, Path) else str(match_run(value) or value)


@contextmanager
def _system_refusals() -> Iterator[None]:
    """Turn what the system refuses, wherever it does (disk, memory, open files), into an error that says what to do."""
    try:
        yield
    except LlmtuneError:
        raise
    except Exception as error:  # libraries have errors of their own for it, such as pyarrow.ArrowException
        if (lost := lost_process(error)) is not None:
            raise lost from error
        problem = system_problem(error) or _misplaced(error)
        if problem is None:
            raise
        raise EnvironmentProblem(problem) from error


def _misplaced(error: Exception) -> Problem | None:
    """Return what is wrong where a file is missing, or a folder or a pipe is in its place."""
    if isinstance(error, OSError) and error.filename and error.errno in IN_PLACE_OF_A_FILE:
        fix = "Put the file back; what belongs to a run is made again by its recipe."
        return Problem(f"cannot be read: {error.strerror}", str(error.filename), fix)
    return None


def _check_names(arguments: Mapping[str, object]) -> None:
    """Refuse names that are not UTF-8: files of a run, which name them, hold text.

    Raises RecipeError; EnvironmentProblem where the working folder is gone.
    """
    try:
        given = {"the working folder": os.getcwd(), **arguments}
    except OSError as error:
        raise EnvironmentProblem.of(f"it is gone: {error.strerror}", "the working folder", "Change to one.") from error
    RecipeError.collect(
        Problem(
            "it is not UTF-8",
            f"{name}: {visible(str(value))}",
            "Rename the file or folder, or write the value in UTF-8.",
        )
        for name, values in given.items()
        for value in (values if isinstance(values, list) else [values])
        if isinstance(value, str | os.PathLike) and any("\ud800" <= letter <= "\udfff" for letter in str(value))
    )


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
        report = error.report if isinstance(error, GateFailed) else None
        print_json({**(report or {}), "error": {"exit_code": error.exit_code, "problems": problems}})
