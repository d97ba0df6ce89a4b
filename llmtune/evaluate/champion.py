"""`evaluate.champion`: the run that the tuned model is held against, row by row; without torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from llmtune.errors import LlmtuneError, Problem, RecipeError
from llmtune.evaluate.looks import check_looks, count_look, hash_weights
from llmtune.evaluate.opened_runs import (
    ScoredRun,
    check_alike,
    check_rows,
    find_other_keys,
    keep_asked,
    open_run_scores,
    pair_metrics,
)
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows
from llmtune.evaluate.release_file import find_release, open_release
from llmtune.recipe.schema import Recipe
from llmtune.records import Champion, Evaluation, Examples, Rows
from llmtune.store.run_folder import RunFolder, recipe_of_run

KEY = "evaluate.champion"
NAME, OWN = "the champion", "this run"
NOTHING = Evaluation({}, {}, {}, (), (), 0)


def open_champion(recipe: Recipe, run: Path | None = None) -> ScoredRun | None:
    """Open the champion that a recipe names for the run in the folder `run`; None where it names none.

    Raises:
        RecipeError: no run with scores or release file is there, it has another task, or it is `run` itself.
        EnvironmentProblem: its scores are damaged.
    """
    if recipe.evaluate.champion is None:
        return None
    try:
        path = find_release(Path(recipe.evaluate.champion), recipe.name)
    except RecipeError as error:
        raise _about_champion(error) from None
    if run is not None and os.path.realpath(run) == os.path.realpath(path):
        fix = "Copy the folder of the champion to another place, and name that."
        raise RecipeError.of("the champion is the folder of this run: it would be compared with itself", KEY, fix)
    try:
        champion = open_release(path, NAME) if path.is_file() else open_run_scores(path, NAME)
    except LlmtuneError as error:
        raise _about_champion(error) from None
    if champion.recipe.task != recipe.task:
        what = f"the champion has task {champion.recipe.task}, and this recipe task {recipe.task}"
        raise RecipeError.of(what, f"{KEY}: {path}", "Name a run of the same task.")
    return champion


def _about_champion(error: LlmtuneError) -> LlmtuneError:
    return type(error)(*(replace(one, where=f"{KEY}: {one.where}") for one in error.problems))


def check_champion(recipe: Recipe, run: RunFolder, rows: Rows, examples: Examples) -> None:
    """Refuse a champion with other test rows or settings of measurement, as far as it can be known before training.

    `recipe` is as `recipe.yaml` in the folder `run` has it.

    Raises:
        DataError: other test rows.
        RecipeError: other settings, or more looks than `evaluate.looks`; and as `open_champion` does.
        EnvironmentProblem: looks cannot be counted.
    """
    from llmtune.data.examples import ExampleReader  # it imports transformers

    champion = open_champion(recipe, run.path)
    if champion is None:
        return
    numbers = sorted({int(row) for row in ExampleReader(examples, "test").rows})
    own = ScoredRun(OWN, recipe, NOTHING, PerRowScores(rows=name_test_rows(rows, numbers)))
    check_rows([champion, own])
    shared = [metric for metric in champion.measures.tuned if metric in recipe.evaluate.metrics]
    fix = "Give both the same value, or score the champion again: llmtune evaluate RUN --set ..."
    RecipeError.collect(Problem(what, KEY, fix) for what in find_other_keys(champion, own, shared))
    check_looks(recipe, champion, run.manifest["fingerprint"])


def note_look(run: RunFolder, console: Console) -> None:
    """Count the look at the scores of a trained run, before they are seen, and note it in the run."""
    recipe = recipe_of_run(run).recipe
    champion = open_champion(recipe, run.path)
    look = count_look(recipe, champion, run.manifest["fingerprint"], hash_weights(run.path)) if champion else None
    if look:
        console.print(f"evaluate: {look}", highlight=False, markup=False)
    if run.findings.get("look") != look:
        run.note(look=look)


def make_challenge(run: RunFolder) -> Callable[[Evaluation, PerRowScores], Champion] | None:
    """Return what compares the scores of a run with those of the champion that its recipe names, if it names one."""
    recipe = recipe_of_run(run).recipe
    champion = open_champion(recipe, run.path)
    return partial(compare_with_champion, champion, recipe) if champion else None


def compare_with_champion(
    champion: ScoredRun, recipe: Recipe, evaluation: Evaluation, measures: PerRowScores
) -> Champion:
    """Compare the tuned model with the champion, on what both were measured by.

    Raises DataError or RecipeError where they were not measured on the same rows in the same way.
    """
    own = ScoredRun(OWN, recipe, evaluation, keep_asked(measures, recipe))
    check_alike([champion, own])
    difference, left_out = pair_metrics(champion, own)
    scores = {metric: champion.measures.tuned[metric].value for metric in difference}
    folder = find_release(Path(recipe.evaluate.champion or ""), recipe.name)
    return Champion(str(folder), scores, difference, left_out)
