"""All errors for users, with their exit codes."""

from __future__ import annotations

import errno
import re
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, bidirectional overrides and lone surrogates."""
_FULL = "Free space, or choose another folder with --out."
_FORBIDDEN = "Change its permissions, or choose another folder with --out."
_MEMORY = "Close other programs, give the process more memory, or process less at once."
_LIMITS = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("the disk quota is used up", _FULL),
    errno.EFBIG: ("a file would become larger than the system allows", "Raise the limit on files: ulimit -f."),
    errno.EROFS: ("cannot be read or written: the file system is read-only", _FORBIDDEN),
    errno.EACCES: ("cannot be read or written: permission denied", _FORBIDDEN),
    errno.EPERM: ("cannot be read or written: operation not permitted", _FORBIDDEN),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter name."),
    errno.EMFILE: ("too many files are open", "Raise the limit on open files: ulimit -n 4096."),
    errno.ENFILE: ("too many files are open on this machine", "Close other programs."),
    errno.ENOMEM: ("the memory is used up", _MEMORY),
    errno.EAGAIN: ("cannot start more processes or threads", "Raise the limit on processes: ulimit -u."),
    errno.EIO: ("the disk cannot be read or written (input/output error)", "Check the system log (dmesg)."),
}
"""System error numbers -> what is wrong, and the fix."""
_IN_TEXT = {
    "no space left": errno.ENOSPC,
    "storagefull": errno.ENOSPC,
    "pytorchstreamwriter": errno.ENOSPC,
    "unexpected pos": errno.ENOSPC,
    " requested and ": errno.ENOSPC,  # numpy: "N requested and M written"
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
    "too many open files": errno.EMFILE,
    "cannot allocate memory": errno.ENOMEM,
    "failed to map segment": errno.ENOMEM,  # the loader of shared libraries, during an import
    "can't start new thread": errno.EAGAIN,
    "resource temporarily unavailable": errno.EAGAIN,
}
_CODE = re.compile(r"(?:os error|os \{ code:|\[errno) (\d+)")


_ORIGIN = re.compile(r"(?P<file>.*):(?:(?P<alone>\d+)|row (?P<row>\d+)(?: \(line (?P<line>\d+)\))?)", re.DOTALL)


def write_origin(file: str, *, line: int | None = None, row: int | None = None) -> str:
    """Return the place of a row: `file:line`, `file:row N`, or `file:row N (line M)` if row and line differ."""
    if row is None or row == line:
        return f"{file}:{line}"
    return f"{file}:row {row}" + ("" if line is None else f" (line {line})")


def read_origin(origin: str) -> tuple[str, int | None, int | None]:
    """Return the file, the line and the row of a place that `write_origin` wrote; any other text is a file."""
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        return origin, None, None
    line, row = (None if text is None else int(text) for text in (match["alone"] or match["line"], match["row"]))
    return match["file"], line, row


@dataclass(frozen=True)
class Problem:
    """One problem: what is wrong with the value, where, and what to do."""

    what: str
    where: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n    {self.fix}" if self.fix else head


class LlmtuneError(Exception):
    """An error that a user can fix: one message for all its problems, without a traceback.

    LlmtuneError
    ├── RecipeError        2   recipe or usage
    ├── DataError          3   rows missing, unreadable or bad
    ├── EnvironmentProblem 4   device, dependency, model, memory, disk, permission, network
    │   └── LostProcess    4   another process of the run is gone
    ├── TrainingError      5   diverged, or out of memory after every remedy
    ├── GateFailed         6   a gate, a parity check or a verification failed
    │   └── GateUnsure     7   the rows are too few to decide a gate
    └── Stopped       130/143  interrupted or terminated, with the work saved
    """

    exit_code: int = 1
    reported = False
    """Whether the run's report and junit.xml already have it."""

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error names at least one problem"
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def of(cls, what: str, where: str | None = None, fix: str | None = None) -> LlmtuneError:
        """Build an error with a single problem."""
        return cls(Problem(what, where, fix))

    @classmethod
    def collect(cls, problems: Iterable[Problem]) -> None:
        """Raise one error with all `problems`; do nothing without problems."""
        problems = tuple(problems)
        if problems:
            raise cls(*problems)


class RecipeError(LlmtuneError):
    """A mistake in the recipe or in the command line."""

    exit_code = 2


class DataError(LlmtuneError):
    """Missing, unreadable or bad rows."""

    exit_code = 3


class EnvironmentProblem(LlmtuneError):
    """A problem with device, dependency, model files, memory, disk, permission or network."""

    exit_code = 4


class LostProcess(EnvironmentProblem):
    """The connection to another process of the run is lost; that process reports the cause."""


class TrainingError(LlmtuneError):
    """Training diverged, or ran out of memory after every remedy."""

    exit_code = 5


class GateFailed(LlmtuneError):
    """A gate, a parity check or a verification did not pass."""

    exit_code = 6
    report: dict[str, Any] | None = None
    """Content of report.json if a gate failed; `--json` prints it with the error."""


class GateUnsure(GateFailed):
    """The rows are too few to decide a gate on an interval, with `evaluate.when_unsure: report`."""

    exit_code = 7


BY_EXIT_CODE: dict[int, type[LlmtuneError]] = {
    kind.exit_code: kind for kind in (RecipeError, DataError, EnvironmentProblem, TrainingError, GateFailed, GateUnsure)
}
"""Exit code of another llmtune process -> the error to end this process with."""


class Stopped(LlmtuneError):
    """The user (SIGINT, 130) or the system (SIGTERM, 143) stopped the run; its work is saved."""

    def __init__(self, *problems: Problem, signal_number: int = 2) -> None:
        super().__init__(*problems)
        self.exit_code = 128 + signal_number  # shell convention


def nearest(word: str, names: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` for the name closest to `word`, or an empty string."""
    spelled = {name.casefold(): name for name in reversed(names)}
    close = get_close_matches(word.casefold(), spelled, n=1, cutoff=0.6)
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""


def refuse_repeated(names: Iterable[str], where: str) -> None:
    """Raise RecipeError for names that an option gives twice: the last value would win without a word."""
    twice = [name for name, number in Counter(names).items() if number > 1]
    RecipeError.collect(Problem(f"{name!r} is given twice", where, "Give it once.") for name in twice)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, with the next one after a colon, or its type if it has no text."""
    lines = [*map(str.strip, str(error).strip().splitlines())] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def describe_end(status: int) -> str:
    """Return how a process ended, from its exit status, which is negative for a signal."""
    name = next((one.name for one in signal.Signals if one == -status), f"signal {-status}")
    return f"was killed by {name}" if status < 0 else f"ended with status {status}"


def visible(text: str) -> str:
    """Escape terminal control characters in a text, such as escape codes."""
    return STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def system_errno(error: BaseException) -> int | None:
    """Return the system error number that caused an error, or None.

    Libraries that write files from Rust or C++ have the number only in their text.
    """
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _LIMITS else None
    text = str(error).lower()
    stated = _CODE.search(text)
    if stated and int(stated[1]) in _LIMITS:
        return int(stated[1])
    return next((number for words, number in _IN_TEXT.items() if words in text), None)


def system_problem(error: BaseException, where: str | None = None) -> Problem | None:
    """Return the problem of a system error (disk, memory, open files, permission), or None for other errors."""
    number = system_errno(error)
    if number is None:
        return None
    what, fix = _LIMITS[number]
    place = error.filename if isinstance(error, OSError) else None
    return Problem(what, str(place) if place else where, fix)
