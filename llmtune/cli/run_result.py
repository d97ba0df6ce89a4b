"""Collects the results of a command that runs a recipe, and makes its JSON document when it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import __version__
from llmtune.cli.output_streams import end_with, print_json
from llmtune.errors import Problem, RecipeError
from llmtune.records import Json

if TYPE_CHECKING:
    from llmtune.recipe.loader import LoadedRecipe

Stamp = tuple[int, int]


@dataclass
class RunResult:
    """The result of a command so far. Reports in the run folder count only if this command wrote them."""

    command: str
    recipe: str | None
    """As typed; None if the command line cannot be parsed."""
    out: Path | None = None
    """As typed."""
    started: float = field(default_factory=time.monotonic)
    loaded: LoadedRecipe | None = None
    folder: Path | None = None
    before: Mapping[str, Stamp | None] = field(default_factory=dict)
    """State of the report files when the folder became known."""
    plan: Json | None = None
    """The result of a dry run."""

    def begin(self, loaded: LoadedRecipe, folder: Path) -> None:
        """Note the recipe and the run folder, before anything is written there."""
        from llmtune.store.run_folder import REPORTS  # late: imports the recipe's schema, slow for --help

        self.loaded, self.folder = loaded, Path(os.path.abspath(folder))
        self.before = {name: _stamp(self.folder / name) for name in REPORTS}

    def describe(self, exit_code: int, error: Mapping[str, Any] | None) -> Json:
        """Return the document, `report.run_document.RunDocument`."""
        from llmtune.report.run_document import SCHEMA_VERSION, describe_report
        from llmtune.store.atomic_files import read_json
        from llmtune.store.run_folder import REPORTS

        folder, recipe = self.folder, self.loaded.recipe if self.loaded else None
        written = [name for name in REPORTS if folder and _stamp(folder / name) not in (None, self.before[name])]
        report = read_json(folder / "report.json") if folder and "report.json" in written else None
        shown = REPORTS if report else written
        kinds = dict(zip(("html", "md", "json", "junit"), REPORTS, strict=True))
        return {
            "schema_version": SCHEMA_VERSION,
            "llmtune": __version__,
            "command": self.command,
            "recipe": self.recipe,
            "name": recipe and recipe.name,
            "task": recipe and recipe.task,
            "folder": folder and str(folder),
            "out": self.out and str(self.out),
            "exit_code": exit_code,
            "error": error,
            **describe_report(report, folder or Path()),
            "reports": {
                kind: str(folder / name) if folder and name in shown and (folder / name).is_file() else None
                for kind, name in kinds.items()
            },
            "plan": self.plan,
            "seconds": round(time.monotonic() - self.started, 3),
        }


def result_of(command: str, recipe: str, out: Path | None) -> RunResult:
    """Begin the result of a command; with --json it is printed when the command ends."""
    result = RunResult(command, recipe, out)
    end_with(result.describe)
    return result


def print_usage_error(command: str, message: str) -> None:
    """Print the document of a command line that cannot be parsed."""
    from llmtune.report.run_document import COMMANDS

    fix = f"See: llmtune {command} --help" if command else "See: llmtune --help"
    problems = [vars(Problem(message, "the command line", fix))]
    error = {"kind": RecipeError.__name__, "exit_code": RecipeError.exit_code, "problems": problems}
    is_run = command in COMMANDS
    print_json(RunResult(command, None).describe(RecipeError.exit_code, error) if is_run else {"error": error})


def _stamp(file: Path) -> Stamp | None:
    """Return what changes when a file is replaced; None without the file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
