"""`evaluate.champion`: the run that the tuned model is compared with, row by row; without torch."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from rich.console import Console
from typing_extensions import TypedDict

from llmtune.data.row_store import RECORD, iterate_ids, load_rows
from llmtune.errors import DataError, EnvironmentProblem, LlmtuneError, Problem, RecipeError
from llmtune.evaluate.metric import paired_difference
from llmtune.evaluate.opened_runs import (
    ScoredRun,
    find_other_keys,
    find_other_measure,
    find_release,
    keep_asked,
    open_release,
    open_run_scores,
    pair_measures,
    read_release,
)
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows
from llmtune.recipe.evaluate_section import ERROR
from llmtune.recipe.schema import Recipe
from llmtune.records import Champion, Evaluation, Examples, Json, Rows
from llmtune.store.atomic_files import explained, hash_file, hash_value
from llmtune.store.run_folder import MANIFEST, RunFolder, recipe_of_run

LEDGER = "releases.jsonl"
LOOKS = "evaluate.looks"
ROUNDING = 1e-12


class LedgerLine(TypedDict):
    """A line of the ledger."""

    tests: str
    trained: str
    champion: str
    alpha: Annotated[float, Field(gt=0, le=ERROR)]
    run: NotRequired[str]
    name: NotRequired[str]
    """Name of the recipe."""


@dataclass(frozen=True)
class Ledger:
    """What `releases.jsonl` next to the champion says of one set of test rows, or of one that grows with the data."""

    path: Path
    tests: str
    """Hash of the test rows, whatever their order."""
    champion: str
    """Hash of what the champion's run trained."""
    lines: tuple[LedgerLine, ...]

    def spent(self, trained: str = "") -> float:
        """Return the error that models have spent; without that of `trained` against this champion."""
        spent = defaultdict[tuple[str, str], float](float)
        for line in self.lines:
            spent[line["trained"], line["champion"]] = max(spent[line["trained"], line["champion"]], line["alpha"])
        return sum(alpha for looked, alpha in spent.items() if looked != (trained, self.champion))

    def require_left(self, alpha: float, trained: str = "") -> None:
        """Raise RecipeError where less than `alpha` of the error is left."""
        left = ERROR - self.spent(trained)
        if alpha <= left + ROUNDING:
            return
        looked = len({(line["trained"], line["champion"]) for line in self.lines})
        what = f"{looked} models were already compared on these test rows; the 5 % false-positive budget is used up"
        fix = "Set data.test to a file of new rows: the count begins anew with them."
        if left > ROUNDING:
            fix = f"Set it to {int(ERROR / left) + 1} or more, for wider intervals; or set data.test to new rows."
        raise RecipeError.of(what, f"{LOOKS}: {self.path}", fix)


def open_ledger(recipe: Recipe, champion: ScoredRun) -> Ledger | None:
    """Open the ledger beside the champion of a recipe; None where it wants no looks counted.

    Raises:
        RecipeError: the champion is no release, beside which the ledger lies.
        EnvironmentProblem: it cannot be written, or one of its lines is damaged.
    """
    if recipe.evaluate.looks is None:
        return None
    release = find_release(Path(recipe.evaluate.champion or ""), recipe.name)
    if not release.is_file():
        what = "looks are counted beside a release file, and the champion is a run folder"
        raise RecipeError.of(what, LOOKS, f"Write one, and name it as evaluate.champion: llmtune release {release}")
    path = release.parent / LEDGER
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        fix = "Give the job a copy of the folder that it may write, and keep the file that it leaves there."
        raise EnvironmentProblem.of("cannot be written, so this look would not be counted", str(path), fix)
    tests = hash_value(sorted(champion.measures.rows))
    with explained(path):
        texts = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    try:
        lines = [TypeAdapter(LedgerLine).validate_json(text) for text in texts if text.strip()]
    except ValidationError:
        fix = "Put it back as the repository has it; of a merge, keep the lines of both sides."
        raise EnvironmentProblem.of("damaged: a line is not what llmtune wrote", str(path), fix) from None
    grows = not isinstance(recipe.data.test, tuple)  # then each week's test rows are mostly those of the week before
    own = tuple(line for line in lines if line["tests"] == tests or (grows and line.get("name") == recipe.name))
    return Ledger(path, tests, read_release(release)["trained"], own)


def hash_weights(run: Path) -> str:
    """Hash what a run trained, without what names folders of this machine."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("weights/*.safetensors")]
    return hash_value([hash_file(file) for file in sorted(files)])


def check_looks(recipe: Recipe, champion: ScoredRun, fingerprint: str) -> None:
    """Refuse, before training, a run for which no error is left; one that has been counted may come again."""
    ledger = open_ledger(recipe, champion)
    if ledger and fingerprint not in {line.get("run") for line in ledger.lines}:
        ledger.require_left(recipe.evaluate.alpha)


def count_look(recipe: Recipe, champion: ScoredRun, fingerprint: str, trained: str) -> str | None:
    """Add a look to the ledger, before its scores are seen, and return which it is; None where none is counted.

    The same model against the same champion is counted once, and the champion itself is not.

    Raises as `open_ledger` does, and RecipeError where the error is spent.
    """
    ledger = open_ledger(recipe, champion)
    if ledger is None or trained == ledger.champion:
        return None
    alpha, own = recipe.evaluate.alpha, (trained, ledger.champion)
    known = [line for line in ledger.lines if (line["trained"], line["champion"]) == own]
    if max((line["alpha"] for line in known), default=0.0) < alpha:
        ledger.require_left(alpha, trained)
        line: Json = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "name": recipe.name, "run": fingerprint}
        line |= {"tests": ledger.tests, "trained": trained, "champion": ledger.champion, "alpha": alpha}
        with explained(ledger.path), ledger.path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            begin = "" if file.read() in (b"", b"\n") else "\n"  # an editor may have taken the last line's end
            file.write(f"{begin}{json.dumps(line)}\n".encode())
    looked = dict.fromkeys([*((line["trained"], line["champion"]) for line in ledger.lines), own])
    return f"look {[*looked].index(own) + 1} of {recipe.evaluate.looks} on these test rows, counted in {LEDGER}"


KEY = "evaluate.champion"
NAME, OWN = "the champion", "this run"
NOTHING = Evaluation({}, {}, {}, (), 0)
NONE_ASKED = PerRowScores()
ROWS_FIX = (
    "Keep the test rows in a file, the same for both: write it with llmtune prepare RECIPE --write-test FILE, and set "
    "data.test: FILE."
)


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


def check_champion(recipe: Recipe, run: RunFolder, rows: Rows, examples: Examples, console: Console) -> None:
    """Refuse a champion without common test rows or with other settings of measurement, as far as is known by then.

    Prints how many rows can be compared where they are not all. `recipe` is that of `recipe.yaml` in the folder `run`.

    Raises:
        DataError: no test row of this run is one that the champion was not trained on.
        RecipeError: other settings, or more looks than `evaluate.looks`; and as `open_champion` does.
        EnvironmentProblem: looks cannot be counted.
    """
    from llmtune.data.examples import ExampleReader  # it imports transformers

    champion = open_champion(recipe, run.path)
    if champion is None:
        return
    numbers = sorted({int(row) for row in ExampleReader(examples, "test").rows})
    names = name_test_rows(rows, numbers)
    shared, total = len({*names} & {*champion.measures.rows}), len(names)
    further = len(list_unseen(champion, find_champion_run(recipe, run.path), names))
    if not shared + further:
        what = f"none of the {total} test rows can be compared: the champion was trained on them or did not answer them"
        raise DataError.of(what, KEY, ROWS_FIX)
    if shared < total:
        asked = f"; its model answers {further} more that it was not trained on" if further else ""
        text = f"champion: {shared} of {total} test rows are test rows of the champion too{asked}"
        console.print(text, highlight=False, markup=False)
    own = ScoredRun(OWN, recipe, NOTHING, PerRowScores(rows=names))
    metrics = [metric for metric in champion.measures.tuned if metric in recipe.evaluate.metrics]
    fix = "Give both the same value, or score the champion again: llmtune evaluate RUN --set ..."
    RecipeError.collect(Problem(what, KEY, fix) for what in find_other_keys(champion, own, metrics))
    check_looks(recipe, champion, run.manifest["fingerprint"])


def find_champion_run(recipe: Recipe, run: Path) -> Path | None:
    """Return the run folder of the champion, where its model and its rows are; None where that is gone.

    Of a release file it is the folder of its name next to `run`, if it holds the weights that were released.
    """
    path = find_release(Path(recipe.evaluate.champion or ""), recipe.name)
    if path.is_file():
        release = read_release(path)
        path = run.absolute().parent / release["run"]
        if os.path.realpath(path) == os.path.realpath(run) or hash_weights(path) != release["trained"]:
            return None
    return path if (path / MANIFEST).is_file() and (path / "data" / "rows" / RECORD).is_file() else None


def list_unseen(champion: ScoredRun, folder: Path | None, names: Sequence[str]) -> list[int]:
    """Return the places of those test rows that the champion neither answered nor had in training or validation.

    `folder` is its run folder; without one they cannot be known.
    """
    if folder is None:
        return []
    known = load_rows(folder / "data" / "rows")
    learned = {row for split in ("train", "validation") for row in iterate_ids(known, split)}
    answered = {*champion.measures.rows}
    new = [place for place, name in enumerate(names) if name not in answered]
    return [place for place in new if names[place].rpartition("-")[0] not in learned]


def note_look(run: RunFolder, console: Console) -> None:
    """Count the look at the scores of a trained run, before they are seen, and note it in the run."""
    recipe = recipe_of_run(run).recipe
    champion = open_champion(recipe, run.path)
    look = count_look(recipe, champion, run.manifest["fingerprint"], hash_weights(run.path)) if champion else None
    if look:
        console.print(f"evaluate: {look}", highlight=False, markup=False)
    if run.findings.get("look") != look:
        run.note(look=look)


AskChampion = Callable[[Path, Sequence[int]], PerRowScores]
"""Lets the model of the run folder answer the test rows at these places, and measures the answers."""


def face_champion(run: RunFolder, ask: AskChampion, evaluation: Evaluation, measures: PerRowScores) -> Champion | None:
    """Compare the scores of a run with those of the champion that its recipe names; None where it names none."""
    recipe = recipe_of_run(run).recipe
    champion = open_champion(recipe, run.path)
    if champion is None:
        return None
    folder = find_champion_run(recipe, run.path)
    places = list_unseen(champion, folder, measures.rows)
    asked = ask(folder, places) if folder and places else NONE_ASKED
    return compare_with_champion(champion, recipe, evaluation, measures, asked)


def compare_with_champion(
    champion: ScoredRun,
    recipe: Recipe,
    evaluation: Evaluation,
    measures: PerRowScores,
    asked: PerRowScores = NONE_ASKED,
) -> Champion:
    """Compare the tuned model with the champion on the rows of both.

    `asked` is what the champion's model answered to further test rows of this run. A metric that is not measured in the
    same way is left out.

    Raises:
        RecipeError: settings of measurement differ.
        DataError: no row is common to both.
    """
    champion = replace(champion, measures=champion.measures.with_rows(asked))
    own = ScoredRun(OWN, recipe, evaluation, keep_asked(measures, recipe))
    both = {*champion.measures.rows} & {*own.measures.rows}
    if not both:
        raise DataError.of("no test row is one of the champion's too", KEY, ROWS_FIX)
    pairs, left_out = pair_measures(champion, own)
    fix = "Measure one of them again with the other's: llmtune evaluate RUN --set KEY=VALUE"
    RecipeError.collect(Problem(what, KEY, fix) for what in find_other_keys(champion, own, pairs))
    for metric in [*pairs]:
        if (other := find_other_measure(champion, own, metric)) is not None:
            left_out[metric] = other[0]
            del pairs[metric]
    return Champion(
        folder=str(find_release(Path(recipe.evaluate.champion or ""), recipe.name)),
        scores={metric: before.value for metric, (before, _) in pairs.items()},
        difference={
            metric: paired_difference(before, after, champion.recipe.seed) for metric, (before, after) in pairs.items()
        },
        left_out=left_out,
        tuned={metric: after.value for metric, (_, after) in pairs.items()},
        rows=len(both),
        asked=len(both & {*asked.rows}),
    )
