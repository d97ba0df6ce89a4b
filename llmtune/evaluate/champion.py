"""`evaluate.champion`: the run that the tuned model is compared with, row by row. Does not import torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from llmtune.data.inherited_rows import find_inheritance, find_learned, has_learned
from llmtune.errors import DataError, LlmtuneError, Problem, RecipeError
from llmtune.evaluate.class_alignment import align_classes, find_partial, follow_rows, shared_names
from llmtune.evaluate.class_changes import check_classes, judge_classes
from llmtune.evaluate.looks import check_looks, count_look
from llmtune.evaluate.metric import PairedMeasures, own_interval, paired_difference
from llmtune.evaluate.opened_runs import (
    ScoredRun,
    find_other_keys,
    find_other_measure,
    keep_asked,
    open_run_scores,
    pair_measures,
)
from llmtune.evaluate.paired_statistics import subtract_intervals
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows
from llmtune.evaluate.ranking_metrics import SEARCHED
from llmtune.evaluate.release_records import locate_champion, open_release, read_release
from llmtune.evaluate.slices import score_slice
from llmtune.recipe.gate_grammar import NEW
from llmtune.recipe.schema import Recipe
from llmtune.records import FEWEST_ROWS, Examples, Row, Rows
from llmtune.store.atomic_files import hash_file, hash_value
from llmtune.store.processes import world_size
from llmtune.store.release_store import is_stored, release_address
from llmtune.store.run_folder import MANIFEST, RunFolder, read_run, recipe_of_run
from llmtune.store.score_records import Champion, ClassChanges, Evaluation, NewRows


@dataclass(frozen=True)
class Asked:
    """Test rows that the champion never saw, and its answers to them."""

    places: tuple[int, ...] = ()
    """Positions of the rows among the test rows."""
    answers: PerRowScores = field(default_factory=PerRowScores)
    """Of the rows that its model could answer."""
    why_none: str = ""
    """Why there are no such rows."""


NONE_ASKED = Asked()


def hash_weights(run: Path) -> str:
    """Hash a run's trained weights, independent of the machine's folder names."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("weights/*.safetensors")]
    return hash_value([hash_file(file) for file in sorted(files)])


KEY = "evaluate.champion"
NAME, OWN = "the champion", "this run"
NOTHING = Evaluation({}, {}, {}, (), 0)
ROWS_FIX = (
    "Keep the test rows in one file for both runs: write it with llmtune prepare RECIPE --write-test FILE, and set "
    "data.test: FILE."
)


def open_champion(recipe: Recipe, run: Path | None = None) -> ScoredRun | None:
    """Open the champion that a recipe names for the run in folder `run`; None if it names none, or no release yet.

    Raises:
        RecipeError: no scored run or release file found, it has another task, or it is `run` itself.
        EnvironmentProblem: its scores are damaged.
    """
    try:
        path = locate_champion(recipe, run)
    except RecipeError as error:
        raise _about_champion(error) from None
    if path is None:
        return None
    if run is not None and os.path.realpath(run) == os.path.realpath(path):
        fix = "Copy the champion's folder elsewhere and name the copy."
        raise RecipeError.of("the champion is the folder of this run: it would be compared with itself", KEY, fix)
    try:
        champion = open_release(path, NAME) if path.is_file() else open_run_scores(path, NAME)
    except LlmtuneError as error:
        raise _about_champion(error) from None
    if champion.recipe.task != recipe.task:
        what = f"the champion has task {champion.recipe.task}, but this recipe has task {recipe.task}"
        raise RecipeError.of(what, f"{KEY}: {path}", "Name a run of the same task.")
    return champion


def _about_champion(error: LlmtuneError) -> LlmtuneError:
    return type(error)(*(replace(one, where=f"{KEY}: {one.where}") for one in error.problems))


def check_champion(
    recipe: Recipe,
    run: RunFolder,
    rows: Rows,
    examples: Examples,
    console: Console,
    ask: Callable[[Path, Sequence[Row]], Sequence[Sequence[str]]] | None = None,
) -> None:
    """Refuse a champion with no common test rows or with other measurement settings, as far as known before training.

    Prints how many rows can be compared if not all can, and classes that appeared, stopped or may have been renamed;
    `ask` returns the classes that the model of a folder answers. `recipe` is that of `recipe.yaml` in the folder `run`.

    Raises:
        DataError: the champion was trained on every test row of this run.
        RecipeError: settings differ, or more looks than `evaluate.looks`; also as `open_champion` does.
        EnvironmentProblem: looks cannot be counted.
    """
    from llmtune.data.examples import ExampleReader  # it imports transformers

    champion = open_champion(recipe, run.path)
    if champion is None:
        if recipe.evaluate.champion is not None:
            console.print(f"champion: none, {recipe.evaluate.champion} has no release yet", highlight=False)
        return
    numbers = sorted({int(row) for row in ExampleReader(examples, "test").rows})
    names, champion = name_test_rows(rows, numbers), follow_rows(champion, rows, recipe.renames)
    folder, total = find_champion_run(recipe, run.path), len(names)
    learned = find_inherited(recipe, folder, rows)
    left = [name for name in names if name.rpartition("-")[0] not in learned]
    shared, further = len({*left} & {*champion.measures.rows}), len(list_unseen(champion, folder, rows, names, learned))
    if not shared + further:
        what = f"none of the {total} test rows can be compared: the champion was trained on them or did not answer them"
        what += ", or a run that one of both models starts from was trained on them" if learned else ""
        raise DataError.of(what, KEY, ROWS_FIX if left else "Set data.test to rows that no earlier run learned.")
    if len(left) < total:
        text = (
            f"champion: {total - len(left)} of {total} test rows were training rows of a run that one of both models "
        )
        console.print(f"{text}starts from, and are left out", style="yellow", highlight=False, markup=False)
    if shared < total:
        unseen_note = f"; its model answers {further} more rows that it was not trained on" if further else ""
        text = f"champion: {shared} of {total} test rows are test rows of the champion too{unseen_note}"
        console.print(text, highlight=False, markup=False)
    this_run = ScoredRun(OWN, recipe, NOTHING, PerRowScores(rows=names))
    metrics = [metric for metric in champion.measures.tuned if metric in recipe.evaluate.chosen_metrics(recipe.variant)]
    fix = "Use the same value for both, or rescore the champion: llmtune evaluate RUN --set ..."
    RecipeError.collect(Problem(what, KEY, fix) for what in find_other_keys(champion, this_run, metrics))
    answer = partial(ask, folder) if ask and folder and world_size() == 1 else None
    check_looks(recipe, champion, run.manifest["fingerprint"], run.path)
    check_classes(champion, run, folder, rows, recipe, answer, console)


def find_champion_run(recipe: Recipe, run: Path) -> Path | None:
    """Return the champion's folder, which has its model and lists the inputs it learned; None if it is gone.

    For a release file this is the folder of that name next to `run`, if it has the released weights.
    """
    path = locate_champion(recipe, run)
    if path is not None and is_stored(path.parent) and (path.parent / MANIFEST).is_file():
        return path.parent
    if path is not None and path.is_file():
        release = read_release(path)
        path = run.absolute().parent / release["run"]
        if os.path.realpath(path) == os.path.realpath(run) or hash_weights(path) != release["trained"]:
            return None
    return path if path is not None and (path / MANIFEST).is_file() and has_learned(path) else None


def find_inherited(recipe: Recipe, folder: Path | None, rows: Rows) -> frozenset[str]:
    """Return the ids of test rows learned by earlier runs that this one or the champion, in `folder`, starts from."""
    recipes = [recipe, recipe_of_run(read_run(folder)).recipe] if folder else [recipe]
    return find_learned(rows, {run for one in recipes for run in find_inheritance(one).runs})


def list_unseen(
    champion: ScoredRun, folder: Path | None, rows: Rows, names: Sequence[str], inherited: frozenset[str]
) -> list[int]:
    """Return the positions of test rows that the champion neither answered nor saw in training or validation.

    It saw a row if it saw its input with any answer. `folder` is its run folder; without it the result is empty. Rows
    that are `inherited` are left out.
    """
    answered = {*champion.measures.rows}
    new = [place for place, name in enumerate(names) if name not in answered]
    if folder is None or not new:
        return []
    seen = inherited | find_learned(rows, [folder])
    return [place for place in new if names[place].rpartition("-")[0] not in seen]


def note_look(recipe: Recipe, run: RunFolder, console: Console) -> None:
    """Count the look at a trained run's scores before they are seen, and record it in the run."""
    champion = open_champion(recipe, run.path)
    trained = hash_weights(run.path)
    look = count_look(recipe, champion, run.manifest["fingerprint"], trained, run.path) if champion else None
    if look:
        console.print(f"evaluate: {look}", highlight=False, markup=False)
    if run.findings.get("look") != look:
        run.note(look=look)


AskChampion = Callable[[Path, Sequence[int]], Asked]
"""Lets the model of a run folder answer the test rows at these positions that are not near its training rows."""
GONE = "the champion's run folder is gone, so the rows that it learned are unknown"
NONE_NEW = "no test row is new to the champion"


JudgeClasses = Callable[..., ClassChanges | None]
"""Compares the classes of champion and own run, given the pairs of their metrics with the names of their rows."""


def face_champion(
    recipe: Recipe, run: RunFolder, rows: Rows, ask: AskChampion, evaluation: Evaluation, measures: PerRowScores
) -> Champion | None:
    """Compare the scores of a run with these rows with those of its recipe's champion; None if it names none."""
    champion = open_champion(recipe, run.path)
    if champion is None:
        return None
    champion = follow_rows(champion, rows, recipe.renames)
    folder = find_champion_run(recipe, run.path)
    inherited = find_inherited(recipe, folder, rows)
    places = list_unseen(champion, folder, rows, measures.rows, inherited)
    if folder and (metrics := list_searched_elsewhere(champion, measures)):
        names = {*champion.measures.rows}
        shared = [place for place, name in enumerate(measures.rows) if name in names]
        again, new_answers = split_answers(ask(folder, [*shared, *places]), measures.rows, places)
        if all(one in again.tuned and again.tuned[one].signature == measures.tuned[one].signature for one in metrics):
            champion = replace(champion, measures=again)
    else:
        new_answers = ask(folder, places) if folder and places else NONE_ASKED
    changes = partial(judge_classes, rows=rows, renames=recipe.renames, hints=run.findings.get("class_hints", ()))
    if not new_answers.places:
        new_answers = replace(new_answers, why_none=NONE_NEW if folder else GONE)
    compared = compare_with_champion(champion, recipe, evaluation, measures, new_answers, inherited, changes)
    return replace(compared, folder=name_champion(locate_champion(recipe, run.path)))


def list_searched_elsewhere(champion: ScoredRun, measures: PerRowScores) -> list[str]:
    """Return the metrics for which the champion searched other passages than this run, as when the test rows grew."""
    pairs = {name: (champion.measures.tuned.get(name, one), one) for name, one in measures.tuned.items()}
    parts = {name: [one.signature.partition(SEARCHED) for one in pair] for name, pair in pairs.items()}
    return [name for name, (before, after) in parts.items() if before[:2] == after[:2] and before[2] != after[2]]


def name_champion(path: Path | None) -> str:
    """Return the address of a champion in the store of releases; the path of any other."""
    stored = path is not None and is_stored(path.parent)
    return release_address(path.parent) if path and stored else str(path)


def compare_with_champion(
    champion: ScoredRun,
    recipe: Recipe,
    evaluation: Evaluation,
    measures: PerRowScores,
    new_answers: Asked = NONE_ASKED,
    inherited: frozenset[str] = frozenset(),
    judge: JudgeClasses = lambda champion, this_run, pairs: None,
) -> Champion:
    """Compare the tuned model with the champion on the rows they share.

    `new_answers` holds the champion's answers to further test rows of this run, and all rows that are new to it. Rows
    with the ids in `inherited` are left out: one of both models learned them in an earlier run. Metrics that the two
    runs measure differently are omitted. Rows of classes that the champion does not have count: its answers to them
    are wrong. `judge` compares the classes.

    Raises:
        RecipeError: measurement settings differ.
        DataError: the runs share no row.
    """
    new_names = {measures.rows[place] for place in new_answers.places}
    this_run = ScoredRun(OWN, recipe, evaluation, keep_asked(measures, recipe).without_rows(inherited))
    champion, this_run, merged = align_classes(champion, alone := this_run, recipe.renames)
    answers = new_answers.answers.without_metrics(merged)
    champion = replace(champion, measures=champion.measures.with_rows(answers))
    both = {*champion.measures.rows} & {*this_run.measures.rows}
    if not both:
        raise DataError.of("no test row is also a test row of the champion", KEY, ROWS_FIX)
    pairs, left_out = pair_measures(champion, this_run)
    fix = "Rescore one of them with the other's settings: llmtune evaluate RUN --set KEY=VALUE"
    RecipeError.collect(Problem(what, KEY, fix) for what in find_other_keys(champion, this_run, pairs))
    for metric in [*pairs]:
        if (other := find_other_measure(champion, this_run, metric)) is not None:
            left_out[metric] = other[0]
            del pairs[metric]
    named = {
        metric: (before, replace(after, names=shared_names(champion, this_run, metric)))
        for metric, (before, after) in pairs.items()
    }
    return Champion(
        folder=recipe.evaluate.champion or "",
        scores={metric: before.value for metric, (before, _) in pairs.items()},
        difference={
            metric: paired_difference(before, after, champion.recipe.seed) for metric, (before, after) in pairs.items()
        },
        left_out=left_out | merged,
        tuned={metric: after.value for metric, (_, after) in pairs.items()},
        rows=len(both),
        asked=len(both & {*new_answers.answers.rows}),
        partial=dict(find_partial(champion, this_run, pairs, len(both))),
        classes=judge(champion, alone, pairs=named),
        new=score_new(replace(champion, measures=answers), this_run, new_names, pairs) if new_names else None,
        why_no_new=new_answers.why_none,
    )


def split_answers(all_answers: Asked, names: Sequence[str], new: Collection[int]) -> tuple[PerRowScores, Asked]:
    """Split answers to all test rows, named by their position: those that are not new, and those to `new` ones."""
    ids = {name.rpartition("-")[0] for place, name in enumerate(names) if place in {*new}}
    others = {name.rpartition("-")[0] for name in all_answers.answers.rows} - ids
    answers = all_answers.answers.without_rows(others)
    return all_answers.answers.without_rows(ids), Asked(
        tuple(place for place in all_answers.places if place in {*new}), answers
    )


def score_new(champion: ScoredRun, this_run: ScoredRun, names: Collection[str], metrics: Collection[str]) -> NewRows:
    """Score all models on the test rows with these names; `champion` has its answers to them.

    Only `metrics` are compared with the champion.
    """
    measures, seed = this_run.measures, this_run.recipe.seed
    new = {place for place, name in enumerate(measures.rows) if name in names}
    apart = measures.subset(new), measures.subset({*range(len(measures.rows))} - new)
    intervals, old = ({metric: own_interval(one, seed) for metric, one in part.tuned.items()} for part in apart)
    from_old = {name: subtract_intervals(one, old[name]) for name, one in intervals.items() if name in old}
    pairs = {name: pair for name, pair in pair_measures(champion, this_run)[0].items() if name in metrics}
    answered = PairedMeasures(*({name: pair[at] for name, pair in pairs.items()} for at in (0, 1)))
    champion_scores, tuned_scores = answered.scores()
    return NewRows(
        scores=score_slice(NEW, new, measures, seed),
        intervals=intervals,
        from_old={name: change for name, change in from_old.items() if math.isfinite(change.low)},
        rows=len({*champion.measures.rows} & {*measures.rows}),
        before=champion_scores,
        tuned=tuned_scores,
        difference=answered.differences(seed, FEWEST_ROWS),
    )
