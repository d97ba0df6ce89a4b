"""Output: progress and messages on stderr, one JSON document on stdout; errors become exit codes."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO

import typer

from llmtune.errors import (
    STEERING,
    EnvironmentProblem,
    LlmtuneError,
    Problem,
    RecipeError,
    Stopped,
    first_line,
    system_problem,
    visible,
)
from llmtune.launch.python_api import make_console
from llmtune.store.atomic_files import plain
from llmtune.store.processes import LEFT, join, lost_process, reports, world_size

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
IN_PLACE_OF_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
"""Error numbers of refused files; `user_files.NotAFileError` has EINVAL."""
RUN_PARAMETERS = {"run", "runs", "what"}
"""Command parameters that name runs."""
REPORT_BUG = "Please report it with the traceback and the output of 'llmtune doctor'. CONTRIBUTING.md says where."
SHOWN_PROBLEMS = 30
"""More than the twenty named bad rows and their surrounding lines."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived while no checkpoint can be written."""


def stderr_console(*, quiet: bool = False) -> Console:
    """Return the console for messages to the user."""
    return make_console(quiet=quiet)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    from llmtune.recipe.secrets import hide_environment  # late: imports the schema, slow for --help

    text = json.dumps(hide_environment(plain(value)), indent=2, ensure_ascii=False)
    typer.echo(STEERING.sub(_json_escape, text), file=_document[-1] if _document else None)


_document: list[TextIO] = []
"""Standard output reserved for the document of --json."""
DescribeEnd = Callable[[int, Mapping[str, Any] | None], Any]
"""Returns the document of a command from its exit code and the error that ended it."""
_endings: list[DescribeEnd] = []


def end_with(describe: DescribeEnd) -> None:
    """Let the running command print one document with --json however it ends: done, an error, a signal or a bug."""
    _endings[-1:] = [describe]


def _describe_failure(exit_code: int, error: Mapping[str, Any] | None) -> Any:
    return {"error": error}


@contextmanager
def _document_alone() -> Iterator[None]:
    """Redirect prints of libraries (such as gptqmodel's greeting) to stderr; stdout gets only the document."""
    _document.append(sys.stdout)
    _endings.append(_describe_failure)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _document.pop()
        _endings.pop()


def _print_end(exit_code: int, kind: str = "", problems: Sequence[Problem] = ()) -> None:
    """Print the document of a command that ends, unless its launcher prints it."""
    if not _document or os.environ.get(LEFT):
        return
    error = {"kind": kind, "exit_code": exit_code, "problems": plain(problems)} if kind else None
    if error or _endings[-1] is not _describe_failure:
        with suppress(*[OSError] * bool(error)):  # the error may be that nothing can be written there
            print_json(_endings[-1](exit_code, error))


def _json_escape(match: re.Match[str]) -> str:
    """Escape C1 controls, direction marks and surrogates; JSON already escapes the lower control characters."""
    return f"\\u{ord(match[0]):04x}"


def print_text(text: str) -> None:
    """Print text of a model or recipe on stdout: unchanged into a file, without control sequences on a terminal."""
    typer.echo(visible(text) if sys.stdout.isatty() else text, nl=False)


class WordWrap:
    """Wraps streamed text between words; text for a file stays unchanged."""

    def __init__(self, width: int | None = None) -> None:
        self._width = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
        self._column, self._waiting = 0, ""

    def add(self, piece: str) -> str:
        """Return the text so far without the last word, which may be incomplete."""
        if self._width is None:
            return piece
        *parts, self._waiting = re.findall(r"\s*\S+|\s+\Z", self._waiting + piece) or [""]
        return "".join(map(self._place, parts))

    def rest(self) -> str:
        """Return the last word."""
        part, self._waiting = self._waiting, ""
        return self._place(part)

    def _place(self, part: str) -> str:
        """Return a word with the space before it, or a line break instead."""
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
    """Turn expected errors into a message on stderr and an exit code; bugs propagate.

    `by_all` is for commands that run in several processes: only one of them prints.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        with _document_alone() if kwargs.get("as_json") else nullcontext():
            try:
                with _system_refusals():
                    _meet(by_all)
                    _check_names(kwargs)
                    for name in [name for name in RUN_PARAMETERS & kwargs.keys() if kwargs[name] is not None]:
                        kwargs[name] = _resolve_runs(kwargs[name])
                    command(*args, **kwargs)
                    _print_end(0)
            except LlmtuneError as error:
                if reports(error):
                    _print_error(error)
                raise typer.Exit(error.exit_code) from None
            except KeyboardInterrupt as stop:
                number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
                problem = _describe_stop(number, kwargs)
                if reports(stop):
                    stderr_console().print(". ".join(filter(None, (problem.what, problem.fix))))
                    _print_end(128 + number, Stopped.__name__, [problem])
                raise typer.Exit(128 + number) from None
            except (typer.Exit, typer.Abort):
                raise
            except Exception as bug:
                _print_end(1, type(bug).__name__, [Problem(first_line(bug), fix=REPORT_BUG)])
                raise

    return wrapper


def _describe_stop(number: int, arguments: Mapping[str, object]) -> Problem:
    what = "terminated" if number == signal.SIGTERM else "interrupted"
    what += "; finished steps are kept" if arguments.keys() >= {"recipe", "out"} else ""
    return Problem(what, fix="To continue, run the same command again." if "out" in arguments else None)


handled_by_all = functools.partial(handled, by_all=True)


def _meet(by_all: bool) -> None:
    """Join the other processes; raises RecipeError if the command runs in one process only."""
    join()
    if world_size() > 1 and not by_all:
        raise RecipeError.of("this command runs in one process", "torchrun", "Start it without torchrun.")


def _resolve_runs(value: Any) -> Any:
    """Replace names of runs by their folders; a Path must be a run folder."""
    from llmtune.store.run_listing import find_run, match_run

    if isinstance(value, list):
        return [type(one)(match_run(str(one)) or one) for one in value]
    return find_run(value) if isinstance(value, Path) else str(match_run(value) or value)


@contextmanager
def _system_refusals() -> Iterator[None]:
    """Turn refusals of the system (disk, memory, open files) into an error with a fix."""
    try:
        yield
    except LlmtuneError:
        raise
    except Exception as error:  # libraries raise their own, such as pyarrow.ArrowException
        if (lost := lost_process(error)) is not None:
            raise lost from error
        problem = system_problem(error) or _misplaced(error)
        if problem is None:
            raise
        raise EnvironmentProblem(problem) from error


def _misplaced(error: Exception) -> Problem | None:
    """Return the problem if a file is missing, or a folder or pipe has its name."""
    if isinstance(error, OSError) and error.filename and error.errno in IN_PLACE_OF_A_FILE:
        fix = "Restore the file. A run's files are made again by running its recipe."
        return Problem(f"cannot be read: {error.strerror}", str(error.filename), fix)
    return None


def _check_names(arguments: Mapping[str, object]) -> None:
    """Refuse names that are not UTF-8, because the files of a run store them as text.

    Raises RecipeError, or EnvironmentProblem if the working folder is gone.
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


def _print_error(error: LlmtuneError) -> None:
    from rich.markup import escape

    from llmtune.recipe.secrets import redact_all  # late, as above

    console, problems = stderr_console(), redact_all(list(error.problems))
    for problem in problems[:SHOWN_PROBLEMS]:
        place = f"[bold]{escape(problem.where)}[/]: " if problem.where else ""
        console.print(f"[bold red]error[/] {place}{escape(problem.what)}")
        if problem.fix:
            console.print(f"  [green]->[/] {escape(problem.fix)}")
    if len(error.problems) > SHOWN_PROBLEMS:
        console.print(f"and {len(error.problems) - SHOWN_PROBLEMS} more")
    _print_end(error.exit_code, type(error).__name__, problems)
