"""A run opened to be compared: its recipe, its scores and every row's part in them, or why it cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtune.data.row_store import iterate_ids, load_rows
from llmtune.errors import DataError, EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.evaluate.per_row_scores import PerRowScores, load_measures
from llmtune.evaluate.results import load_evaluation
from llmtune.recipe import Recipe
from llmtune.recipe.source_map import walk
from llmtune.records import Evaluation, Json
from llmtune.session import trained_name
from llmtune.store.run_folder import RunFolder, read_run, recipe_of_run

SAID = ("name", "deploy", "evaluate.gates")
"""Keys that change neither what is trained nor how it is measured."""


@dataclass(frozen=True)
class OpenedRun:
    """One run with its scores."""

    name: str
    folder: RunFolder
    recipe: Recipe
    evaluation: Evaluation
    measures: PerRowScores

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @cached_property
    def settings(self) -> Json:
        """Every value of the recipe by its dotted key, but for those that decide nothing here."""
        return {key: value for key, value in walk(self.recipe) if key not in SAID}

    @cached_property
    def learned_rows(self) -> tuple[str, ...] | None:
        """What was learned from and chosen by, as sorted hashes of rows; None where the rows are not there any more."""
        try:
            rows = load_rows(self.path / "data" / "rows")
            return tuple(sorted(f"{side} {row}" for side in ("train", "validation") for row in iterate_ids(rows, side)))
        except (LlmtuneError, OSError):
            return None

    @property
    def identity(self) -> tuple[Any, ...]:
        """Hashes of what was trained and of the model below it: equal for the same tuned model."""
        steps = self.folder.manifest["steps"]
        trained = steps["evaluate"]["facts"].get("trained")
        adapter = self.recipe.adapter
        form = (adapter.method, adapter.bnb_4bit_quant_type, adapter.bnb_4bit_use_double_quant)
        return (trained, steps["select"]["facts"]["sha256"], self.recipe.model.dtype, *form)

    def facts(self, step: str) -> Json:
        """What a step left in the manifest; nothing where it did not run."""
        return self.folder.facts(step)

    @property
    def disk_bytes(self) -> int:
        """Size of what was trained: weight files alone, since tokenizer and settings are the same for all."""
        trained = self.path / trained_name(self.recipe)
        return sum(path.stat().st_size for path in trained.rglob("*") if path.suffix in {".safetensors", ".bin"})


def open_runs(paths: Sequence[Path]) -> list[OpenedRun]:
    """Open runs for comparison, each under a name of its own.

    Raises:
        RecipeError: a folder is not a run, or the run has no scores yet.
        EnvironmentProblem: its scores are damaged, or not what the run left.
    """
    opened, refused = [], []
    for path, name in zip(paths, name_runs(paths), strict=True):
        try:
            opened.append(open_run_scores(path, name))
        except LlmtuneError as error:
            refused.append(error)
    for kind in (RecipeError, DataError, EnvironmentProblem):
        kind.collect(problem for error in refused if isinstance(error, kind) for problem in error.problems)
    return opened


def open_run_scores(path: Path, name: str) -> OpenedRun:
    """Open one run; raises as `open_runs` does."""
    folder = read_run(path)
    folder.require_trained()
    fix = f"Score it first: llmtune evaluate {path}"
    if not folder.is_done("evaluate"):
        raise RecipeError.of("this run has no scores yet", str(path), fix)
    place = path / "evaluation"
    evaluation = (
        load_evaluation(place) if folder.is_valid("evaluate", folder.manifest["steps"]["evaluate"]["inputs"]) else None
    )
    if evaluation is None:
        what = "damaged: the scores are not what the run left there"
        raise EnvironmentProblem.of(what, str(place), f"Score it again: llmtune evaluate {path}")
    if not evaluation.tuned:
        fix = "Give data.test a share of the rows, and run it again."
        raise RecipeError.of("nothing was measured in this run: it has no test rows", str(path), fix)
    return OpenedRun(name, folder, recipe_of_run(folder).recipe, evaluation, load_measures(place))


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart; a folder that is named twice is counted."""
    whole = [path.absolute().parts for path in paths]
    for size in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-size:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return list(_counted(names))


def _counted(names: Sequence[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"
