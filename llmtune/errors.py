"""Every error that a user can meet, and its exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what it is with the actual value, where it stands, what to do."""

    what: str
    where: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n    {self.fix}" if self.fix else head


class LlmtuneError(Exception):
    """A mistake or a state of the world that a user can mend: one message for all of its problems, no traceback.

    LlmtuneError
    ├── RecipeError        2   recipe or usage
    ├── DataError          3   rows missing, unreadable or bad
    ├── EnvironmentProblem 4   device, dependency, model, memory, disk, permission, network
    ├── TrainingError      5   diverged, or out of memory after every remedy
    ├── GateFailed         6   a gate, a parity check or a verification failed
    └── Stopped       130/143  interrupted or terminated, with the work saved
    """

    exit_code: int = 1

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
        """Raise one error that holds all of `problems`; do nothing if there are none."""
        found = tuple(problems)
        if found:
            raise cls(*found)


class RecipeError(LlmtuneError):
    """The recipe, or the way a command was called."""

    exit_code = 2


class DataError(LlmtuneError):
    """Rows that are missing, unreadable or bad."""

    exit_code = 3


class EnvironmentProblem(LlmtuneError):
    """The machine: a device, a dependency, a model that is missing or damaged, memory, disk, permission, network."""

    exit_code = 4


class TrainingError(LlmtuneError):
    """Training diverged, or ran out of memory after every remedy."""

    exit_code = 5


class GateFailed(LlmtuneError):
    """A gate, a parity check or a verification did not pass."""

    exit_code = 6


class Stopped(LlmtuneError):
    """The user (SIGINT, 130) or the system (SIGTERM, 143) stopped the run; what was done is saved."""

    def __init__(self, *problems: Problem, signal_number: int = 2) -> None:
        super().__init__(*problems)
        self.exit_code = 128 + signal_number  # as shells count it


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
