"""Checks of a recipe that do not import torch: its files and their columns, trackers, values left to set."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import EnvironmentProblem, Problem, nearest
from llmtune.model.catalogue import candidate_names
from llmtune.recipe.builtin import new_recipe
from llmtune.recipe.loader import LoadedRecipe

if TYPE_CHECKING:
    from llmtune.data.sources import Detected

FEW_ROWS = 30
"""With this many rows or fewer, a split may end up without any."""
MARK = re.compile(r"#\s*SET:")


def check_recipe(loaded: LoadedRecipe) -> list[Detected]:
    """Check that everything the recipe names exists on this machine; return how its local files are read.

    Raises:
        RecipeError: `evaluate.champion` is not a run of this task with scores, or a file of `evaluate.metrics` has no
            such function.
        EnvironmentProblem: a tracker is not installed, or a model's folder is missing.
        DataError: a file is missing, empty or in a format that the task does not know.
    """
    from llmtune.data.sources import resolve_inputs  # imports pyarrow, which `--help` does not need
    from llmtune.evaluate.champion import open_champion  # as does this
    from llmtune.evaluate.own_metrics import list_own_metrics

    open_champion(loaded.recipe)
    list_own_metrics(loaded.recipe.evaluate)
    EnvironmentProblem.collect(_missing(loaded))
    return resolve_inputs(loaded.recipe.data, loaded.recipe.task, local_only=True)


def try_recipe_rows(loaded: LoadedRecipe, detected: Sequence[Detected], *, split_up_to: int = FEW_ROWS) -> None:
    """Refuse data that `prepare` would refuse: check all rows of small files, and the first rows of large ones.

    Up to `split_up_to` rows are also deduplicated and split, which takes longer.

    Raises:
        DataError: too many rows are bad, or no row is left for a split.
    """
    from rich.console import Console

    from llmtune.data.ingest import try_rows  # imports pyarrow, which `--help` does not need

    recipe = loaded.recipe
    count = try_rows(detected, recipe)
    sources = {id(source) for _, place, source in recipe.data.named_sources() if place != "corpus"}
    local = {id(one.input.source) for one in detected} == sources
    if count is not None and count <= split_up_to and local:
        from llmtune.data.preparation import prepare_rows  # takes half a second to import

        alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": None})})
        with tempfile.TemporaryDirectory() as folder:
            prepare_rows(alone, Path(folder) / "rows", Console(quiet=True))


def _missing(loaded: LoadedRecipe) -> Iterator[Problem]:
    for tracker in loaded.recipe.train.report_to:
        if find_spec(tracker) is None:
            what = f"the tracker {tracker} is not installed"
            yield Problem(what, "train.report_to", f"pip install {tracker.replace('_', '-')}")
    model = loaded.recipe.model
    names = [model.name] if model.name else candidate_names(loaded.recipe)
    missing = [("model.name", name) for name in names if os.path.isabs(name) and not os.path.exists(name)]
    missing = missing if len(missing) == len(names) else []  # one of several may be missing: it is skipped
    miner = loaded.recipe.data.negatives and loaded.recipe.data.negatives.model
    if miner and os.path.isabs(miner) and not os.path.exists(miner):
        missing.append(("data.negatives.model", miner))
    for key, name in missing:
        parent = Path(name).parent
        known = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        yield Problem(f"folder {name} not found", key, f"Check the path.{nearest(Path(name).name, known)}")


def marks_left(loaded: LoadedRecipe) -> list[str]:
    """Return the lines of a recipe that are marked SET and still have the starter's value."""
    untouched = {line.strip() for line in new_recipe(loaded.recipe.task).splitlines() if MARK.search(line)}
    lines = enumerate(loaded.file.read_text(encoding="utf-8").splitlines(), 1)
    return [f"line {number}: {MARK.split(line)[0].strip()}" for number, line in lines if line.strip() in untouched]
