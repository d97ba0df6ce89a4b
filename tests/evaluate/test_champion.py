"""`evaluate.champion`: opening it, refusals, and paired comparison."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import finish_run, invoke, write_recipe, write_sums

from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.deploy.releases import make_release
from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.cache_keys import evaluation_files
from llmtune.evaluate.champion import Asked, compare_with_champion, open_champion
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.metric import measure_right
from llmtune.evaluate.per_row_scores import PerRowScores, load_measures
from llmtune.recipe.loader import load_recipe
from llmtune.store.atomic_files import hash_file
from llmtune.store.score_records import Evaluation

GATE = "evaluate.gates=['accuracy.low > champion - 0.5']"


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return finish_run(tmp_path_factory.mktemp("champion"), tiny_llama, train={"num_train_epochs": 1})


def scored(right: list[bool], names: list[str]) -> tuple[Evaluation, PerRowScores]:
    measure = replace(measure_right(right, "accuracy"), at=tuple(range(len(right))))
    measures = PerRowScores({}, {"accuracy": measure}, tuple(names))
    return Evaluation({}, {"accuracy": measure.value}, {}, (), len(right)), measures


def recipe_with(champion: Path, *sets: str) -> Any:
    return load_recipe(champion.parent.parent / "tiny.yaml", [f"evaluate.champion={champion}", *sets]).recipe


def test_rows_are_paired_by_content_in_any_order(champion: Path) -> None:
    opened = open_champion(recipe_with(champion))
    assert opened is not None
    names = ["a", "b", "c", "d", "e", "f"]
    evaluation, measures = scored([True, True, False, False, True, False], names)
    first = replace(opened, evaluation=evaluation, measures=measures)
    turned = scored([False, True, True, False, True, True], names[::-1])
    found = compare_with_champion(first, recipe_with(champion), *turned)
    assert (found.folder, found.rows) == (str(champion), 6)
    assert found.scores == {"accuracy": 0.5}
    assert found.difference["accuracy"].value == pytest.approx(1 / 6)  # c became right


def test_only_shared_rows_are_compared_and_both_scores_cover_only_them(champion: Path) -> None:
    opened = open_champion(recipe_with(champion))
    assert opened is not None
    evaluation, measures = scored([True, True, False, False], ["gone", "a", "b", "c"])
    first = replace(opened, evaluation=evaluation, measures=measures)
    own = scored([True, True, False, False, False], ["c", "b", "a", "new", "newer"])
    found = compare_with_champion(first, recipe_with(champion), *own)
    assert (found.rows, found.asked, found.difference["accuracy"].n) == (3, 0, 3)
    assert found.scores == {"accuracy": pytest.approx(1 / 3)}
    assert found.tuned == {"accuracy": pytest.approx(2 / 3)}
    answered = Asked((3,), PerRowScores({}, scored([True], ["new"])[1].tuned, ("new",)))
    found = compare_with_champion(first, recipe_with(champion), *own, answered)
    assert (found.rows, found.asked, found.difference["accuracy"].n) == (4, 1, 4)
    assert found.scores == {"accuracy": 0.5}
    assert found.new is not None
    assert (found.new.scores.rows, found.new.rows, found.new.before) == (1, 1, {"accuracy": 1.0})
    with pytest.raises(DataError, match="prepare RECIPE --write-test FILE"):
        compare_with_champion(first, recipe_with(champion), *scored([True], ["other"]))


def test_grouped_rows_are_drawn_together_against_a_champion_too(champion: Path) -> None:
    opened = open_champion(recipe_with(champion))
    assert opened is not None
    names, groups = ["a", "b", "c", "d", "e", "f"], (0, 0, 1, 1, 2, 2)

    def grouped(right: list[bool], names: list[str]) -> tuple[Evaluation, PerRowScores]:
        evaluation, scores = scored(right, names)
        own = {metric: one.in_clusters(groups[: len(right)]) for metric, one in scores.tuned.items()}
        return evaluation, replace(scores, tuned=own, clusters=groups[: len(right)])

    evaluation, measures = grouped([True, True, False, False], names[:4])
    first = replace(opened, evaluation=evaluation, measures=measures)
    answered = Asked((4, 5), PerRowScores({}, scored([False, True], names[4:])[1].tuned, tuple(names[4:])))
    own = grouped([False, True, True, True, True, True], names)
    found = compare_with_champion(first, recipe_with(champion), *own, answered)
    difference = found.difference["accuracy"]
    assert (difference.n, difference.groups) == (6, 3)


def test_another_task_or_the_run_itself_cannot_be_the_champion(champion: Path) -> None:
    other = recipe_with(champion).model_copy(update={"task": "completion"})
    with pytest.raises(RecipeError, match="has task chat, but this recipe has task completion"):
        open_champion(other)
    with pytest.raises(RecipeError, match="compared with itself"):
        open_champion(recipe_with(champion), champion)


def test_an_invalid_champion_ends_the_check_and_the_run_with_exit_code_2(champion: Path, tmp_path: Path) -> None:
    recipe = champion.parent.parent / "tiny.yaml"
    unscored = shutil.copytree(champion, tmp_path / "unscored")
    manifest = (unscored / "run.json").read_text()
    (unscored / "run.json").write_text(manifest.replace('"evaluate": {', '"other": {'))
    for path, cure in ((tmp_path / "gone", "Name the folder that"), (unscored, "llmtune evaluate")):
        for command in (["recipes", "check", recipe], ["run", recipe, "--out", tmp_path / "new"]):
            done = invoke(*command, "--set", f"evaluate.champion={path}", "--set", GATE)
            assert done.exit_code == 2, done.output
            assert "evaluate.champion" in done.stderr
            assert cure in " ".join(done.stderr.split())
    assert not (tmp_path / "new" / "data").exists()


@pytest.mark.parametrize("answer", [None, "another"])
def test_other_settings_and_rows_the_champion_learned_are_refused_before_training(
    answer: str | None, champion: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    rows = [row["messages"] for row in read_split(champion, "train")]
    turns = [[*asked, {**reply, "content": answer or reply["content"]}] for *asked, reply in rows]
    learned = {json.dumps({"messages": row}) for row in turns}
    (tmp_path / "learned.jsonl").write_text("\n".join(sorted(learned)[:8]))
    evaluate = {"champion": str(champion), "gates": ["accuracy.low > champion - 0.5"]}
    data = {"train": str(write_sums(tmp_path / "rows.jsonl", 60)), "test": "learned.jsonl", "validation": 0.0}
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, "rows.jsonl", data=data, evaluate=evaluate)
    done = invoke("run", recipe, "--out", tmp_path / "rows")
    assert done.exit_code == 3, done.output
    told = " ".join(done.stderr.split())
    assert "none of the 8 test rows can be compared" in told
    assert "--write-test FILE" in told
    assert not (tmp_path / "rows" / "adapter").exists()
    own = champion.parent.parent / "tiny.yaml"
    sets = ["--set", f"evaluate.champion={champion}", "--set", GATE, "--set", "generation.max_new_tokens=4"]
    done = invoke("run", own, "--out", tmp_path / "settings", *sets, "--set", "seed=8")
    assert done.exit_code == 2, done.output
    assert "generation.max_new_tokens" in done.stderr
    assert not (tmp_path / "settings" / "adapter").exists()


def read_split(run: Path, split: str) -> list[dict[str, Any]]:
    return [row for _, row in iterate_rows(load_rows(run / "data" / "rows"), split)]


def test_on_a_grown_file_shared_rows_are_compared_and_the_champions_model_answers_more(
    champion: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    place = champion.parent
    release = make_release(champion, tmp_path / "releases" / "first.json")
    evaluate = {"champion": str(release.parent), "gates": ["accuracy.low > champion - 0.5"], "when_unsure": "report"}
    rows = write_sums(tmp_path / "rows.jsonl", 60)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, rows, evaluate=evaluate, train={"num_train_epochs": 1})
    before, learned = read_split(champion, "test"), read_split(champion, "train") + read_split(champion, "validation")

    done = invoke("run", recipe, "--out", place / "grown")
    assert done.exit_code in (0, 7), done.stderr
    now = read_split(place / "grown", "test")
    further = [row for row in now if row not in before and row not in learned]
    assert further, "else nothing is tried"
    report = json.loads((place / "grown/report.json").read_text())
    found = report["evaluation"]["champion"]
    assert (found["rows"], found["asked"]) == (len([row for row in now if row in before]) + len(further), len(further))
    assert found["difference"]["accuracy"]["n"] == found["rows"]
    assert f"Compared on {found['rows']} test rows." in report["verdict"]["reason"]
    junit = (place / "grown" / "junit.xml").read_text()
    assert f'name="champion.rows" value="{found["rows"]}"' in junit
    assert not list((place / "grown").glob(".champion-*"))

    again = invoke("run", recipe, "--out", tmp_path / "elsewhere")  # the run folder is not next to it
    alone = json.loads((tmp_path / "elsewhere/report.json").read_text())["evaluation"]["champion"]
    assert (alone["rows"], alone["asked"]) == (found["rows"] - len(further), 0)
    assert f"champion: {alone['rows']} of {len(now)} test rows are test rows of the champion too" in again.stderr


def test_an_unchanged_recipe_is_compared_with_its_champion_and_again_with_another_one(
    champion: Path, tmp_path: Path
) -> None:
    recipe = champion.parent.parent / "tiny.yaml"
    best = shutil.copytree(champion, tmp_path / "best")
    sets = ["--set", f"evaluate.champion={best}", "--set", GATE]
    done = invoke("run", recipe, "--out", tmp_path / "again", *sets)
    assert done.exit_code == 0, done.output
    found = load_evaluation(tmp_path / "again" / "evaluation")
    assert found is not None
    assert found.champion is not None
    assert found.champion.difference["loss"].value == 0
    assert found.champion.scores == {name: found.tuned[name] for name in found.champion.scores}
    assert "Against the champion" in (tmp_path / "again" / "report.md").read_text()
    again = invoke("run", recipe, "--out", tmp_path / "again", *sets)
    assert again.stderr.count("unchanged, skipped") == 6, again.stderr
    (measures,) = (
        path
        for path in evaluation_files(recipe_with(champion, f"evaluate.champion={best}"), tmp_path / "again")
        if path.name == "measures.npz"
    )
    before = hash_file(measures)
    sums = load_measures(best / "evaluation").tuned["loss"].sums_NK
    assert np.isfinite(sums).all()
    assert invoke("evaluate", best, "--set", "evaluate.metrics=[accuracy]").exit_code == 0
    assert hash_file(measures) != before
    changed = invoke("run", recipe, "--out", tmp_path / "again", *sets)
    assert changed.stderr.count("unchanged, skipped") == 5, changed.stderr
    found = load_evaluation(tmp_path / "again" / "evaluation")
    assert found is not None
    assert found.champion is not None
    assert found.champion.left_out == {
        "loss": "measured only in this run",
        "exact_match": "measured only in this run",
    }
