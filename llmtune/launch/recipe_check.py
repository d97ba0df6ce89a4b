"""Checks of a recipe that do not import torch: its files and their columns, trackers, values left to set."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import EnvironmentProblem, LlmtuneError, Problem, RecipeError, nearest
from llmtune.model.catalogue import candidate_names
from llmtune.recipe.builtin import read_starter
from llmtune.recipe.extras import find_missing_extras
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from llmtune.data.sources import Detected
    from llmtune.recipe.schema import Recipe

FEW_ROWS = 1000
"""So many rows are prepared completely, in a fifth of a second."""
FEW_GROUPS = 30
"""With this many different rows or groups, or fewer, a split may end up without any, however many rows there are."""
MARK = re.compile(r"#\s*SET:")


def check_recipe(loaded: LoadedRecipe, *, trains: bool = False) -> list[Detected]:
    """Check that everything the recipe names exists on this machine; return how its local files are read.

    All problems are in one error, whose kind is that of the first.

    With `trains` its trackers and extras must be installed too. Elsewhere they are a note: the machine that trains has
    them.

    Raises:
        RecipeError: `evaluate.champion` is not a run of this task with scores, or a file of `evaluate.metrics` has no
            such function, or rewards are unknown or cannot be called.
        EnvironmentProblem: a tracker is not installed, or a model's folder is missing.
        DataError: a file is missing, empty or in a format that the task does not know.
    """
    errors: list[LlmtuneError] = []
    for stage in (_try_champion, _try_metrics, _try_rewards, partial(_try_machine, trains=trains)):
        try:
            stage(loaded)
        except LlmtuneError as error:
            errors.append(error)
    detected: list[Detected] = []
    try:
        from llmtune.data.sources import resolve_inputs  # late: `--help` does not need it

        detected = resolve_inputs(loaded.recipe.data, loaded.recipe.task, local_only=True)
        if errors and not trains:  # `recipes check` reports the rows, too
            try_recipe_rows(loaded, detected)
    except LlmtuneError as error:
        errors.append(error)
    if errors:
        raise type(errors[0])(*(problem for error in errors for problem in error.problems))
    return detected


def _try_champion(loaded: LoadedRecipe) -> None:
    if loaded.recipe.evaluate.champion:
        from llmtune.evaluate.champion import open_champion  # late: imports numpy and pyarrow

        open_champion(loaded.recipe)


def _try_metrics(loaded: LoadedRecipe) -> None:
    if loaded.recipe.evaluate.own_metrics:
        from llmtune.evaluate.suites.own_metrics import list_own_metrics

        list_own_metrics(loaded.recipe.evaluate)


def _try_rewards(loaded: LoadedRecipe) -> None:
    if loaded.recipe.variant.rewards:
        from llmtune.tasks.reward_rules import require_rewards  # late: imports numpy and pyarrow

        require_rewards(loaded.recipe)


def _try_machine(loaded: LoadedRecipe, trains: bool) -> None:
    packages = [*missing_trackers(loaded.recipe), *find_missing_extras(loaded.recipe)] if trains else []
    EnvironmentProblem.collect([*packages, *_missing(loaded)])


def try_recipe_rows(loaded: LoadedRecipe, detected: Sequence[Detected], *, split_up_to: int = FEW_ROWS) -> list[str]:
    """Refuse data that `prepare` would refuse: check all rows of small files, and the first rows of large ones.

    Up to `split_up_to` rows are also deduplicated and split. Labels are checked as for training. Return a warning if
    the test rows are too few.

    Raises:
        DataError: too many rows or passages are bad, no row is left for a split, a column is missing, or labels are
            misread.
        RecipeError: a metric or a key does not fit the labels.
    """
    from llmtune.data.class_spelling import require_one_spelling
    from llmtune.data.corpus import try_corpus
    from llmtune.data.ingest import try_rows
    from llmtune.data.row_kind import kind_of_task
    from llmtune.tasks.label_rules import LABEL_CHECKS

    recipe = loaded.recipe
    try_corpus(recipe.data)
    tried = try_rows(detected, recipe.data, recipe.task, recipe.evaluate.columns, recipe.renames)
    if recipe.variant.rewards:
        from llmtune.tasks.reward_rules import check_rewarded_rows

        full = ({**json.loads(row.columns or "{}"), **json.loads(row.row)} for row in tried.good)
        check_rewarded_rows(recipe, zip((row.origin for row in tried.good), full, strict=True))
    if any(one.row_format.labels for one in detected):
        require_one_spelling(((row.origin, json.loads(row.row)) for row in tried.good), recipe)
    _try_template(recipe, [row.row for row in tried.good])
    sources = {id(source) for _, place, source in recipe.data.named_sources() if place != "corpus"}
    if not tried.whole or {id(one.input.source) for one in detected} != sources:
        return []
    notes = []
    if len(tried.good) <= split_up_to or tried.different <= FEW_GROUPS:
        from rich.console import Console

        from llmtune.data.data_notes import warn_of_few_test_rows
        from llmtune.data.preparation import prepare_rows  # takes half a second to import

        alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": None})})
        with tempfile.TemporaryDirectory() as folder:
            rows = prepare_rows(alone, Path(folder) / "rows", Console(quiet=True))
            notes = warn_of_few_test_rows(recipe.evaluate.gates, rows.counts)
    if check := LABEL_CHECKS.get(recipe.task):
        check(recipe, [kind_of_task(recipe.task).label(json.loads(row.row)) for row in tried.good])
    if recipe.distil:
        _try_teacher(recipe, [row.row for row in tried.good])
    return notes


def _try_template(recipe: Recipe, texts: Sequence[str]) -> None:
    """Refuse a chat template that leaves out tools of rows, if the model needs no download."""
    name = recipe.model.name or ""
    if not (TASK_FACTS[recipe.task].has_messages and any("tool" in text for text in texts)):
        return
    from rich.console import Console

    from llmtune.model.builtin_models import resolve_builtin
    from llmtune.model.cached_models import find_local_model

    folder = find_local_model(name, recipe.model.revision)
    if name.startswith("builtin:"):
        with suppress(EnvironmentProblem):  # its package is not installed
            folder = resolve_builtin(name.removeprefix("builtin:"), Console(quiet=True))
    if folder is not None:
        from llmtune.data.rendering_check import refuse_lost_tools  # late: imports transformers
        from llmtune.model.processor import load_processor

        processor = load_processor(ModelRef(name, folder, None, ""), recipe.model, recipe.data.system_prompt)
        refuse_lost_tools(texts, len(texts), processor, recipe)


def _try_teacher(recipe: Recipe, texts: Sequence[str]) -> None:
    """Refuse a teacher's run for another task, or whose classes are not those of the rows; `select` checks the rest."""
    from llmtune.data.row_kind import names_in
    from llmtune.model.teacher_files import KEY, other_classes, teacher_run  # late: imports transformers
    from llmtune.store.run_folder import read_run, recipe_of_run

    if (folder := teacher_run(recipe)) is None:
        return
    run = read_run(folder)
    teacher = recipe_of_run(run).recipe
    if teacher.task != recipe.task:
        what = f"{folder} is a model for task {teacher.task}, but the student is for {recipe.task}"
        raise RecipeError.of(what, KEY, f"Name a model for task {recipe.task}.")
    names = recipe.classes or sorted({name for text in texts for name in names_in(json.loads(text))})
    theirs = tuple(run.facts("encode").get("classes") or ()) or teacher.classes
    if theirs and (theirs != names if recipe.classes else {*theirs} != {*names}):
        raise other_classes(str(folder), theirs, names)


def missing_trackers(recipe: Recipe) -> Iterator[Problem]:
    """Yield each tracker of the recipe that is not installed, with its install command."""
    for tracker in recipe.train.report_to:
        if find_spec(tracker) is None:
            what = f"the tracker {tracker} is not installed"
            yield Problem(what, "train.report_to", f"pip install {tracker.replace('_', '-')}")


def _missing(loaded: LoadedRecipe) -> Iterator[Problem]:
    model = loaded.recipe.model
    names = [model.name] if model.name else candidate_names(loaded.recipe)
    missing = [("model.name", name) for name in names if os.path.isabs(name) and not os.path.exists(name)]
    missing = missing if len(missing) == len(names) else []  # one of several may be missing: it is skipped
    negatives, distil = loaded.recipe.data.negatives, loaded.recipe.distil
    further = (("data.negatives.model", negatives and negatives.model), ("distil.teacher", distil and distil.teacher))
    missing += [(key, name) for key, name in further if name and os.path.isabs(name) and not os.path.exists(name)]
    for key, name in missing:
        parent = Path(name).parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        yield Problem(f"folder {name} not found", key, f"Check the path.{nearest(Path(name).name, siblings)}")


def marks_left(loaded: LoadedRecipe) -> list[str]:
    """Return the lines of a recipe that are marked SET and still have the starter's value."""
    untouched = {line.strip() for line in read_starter(loaded.recipe.task).splitlines() if MARK.search(line)}
    lines = enumerate(loaded.file.read_text(encoding="utf-8").splitlines(), 1)
    return [f"line {number}: {MARK.split(line)[0].strip()}" for number, line in lines if line.strip() in untouched]
