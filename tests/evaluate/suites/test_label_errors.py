"""Labels that are likely wrong: planted ones are found, listed in the report and written to a file."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from support.classifying import COLOURS, THINGS, colour_rows, recipe_for, run
from support.runs import invoke

from llmtune.data.preparation import prepare_rows
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.suites.label_errors import add_texts, find_errors, require_labels
from llmtune.recipe.loader import load_recipe
from llmtune.records import SPLITS
from llmtune.tasks.registry import get_task

pytestmark = pytest.mark.needs("cleanlab")

BRIEF = {"num_train_epochs": None, "max_steps": 6}
SETS = {"evaluate": {"suspects": True, "metrics": ["loss"]}, "data": {"deduplicate": "none"}, "train": BRIEF}


def plant(rows: list[dict[str, Any]], count: int) -> list[int]:
    """Give `count` rows the next colour as label; return their line numbers."""
    chosen = sorted(random.Random(1).sample(range(len(rows)), count))
    for at in chosen:
        rows[at]["label"] = COLOURS[(COLOURS.index(rows[at]["label"]) + 1) % 3]
    return [at + 1 for at in chosen]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, built: Any) -> tuple[dict[str, Any], Path, list[int]]:
    """The report of a run with six wrong labels among 120 rows, its folder, and their lines."""
    folder, rows = tmp_path_factory.mktemp("planted"), colour_rows(120)
    lines = plant(rows, 6)
    report, out = run(recipe_for(folder / "r.yaml", built("bert"), rows, **SETS))
    return report, out, lines


def test_planted_label_errors_are_listed_with_line_and_suggestion(
    planted: tuple[dict[str, Any], Path, list[int]],
) -> None:
    report, out, lines = planted
    suspects = [json.loads(line) for line in (out / "evaluation" / "suspects.jsonl").read_text().splitlines()]
    assert {one["line"] for one in suspects} >= {*lines}
    assert len(suspects) <= 2 * len(lines)
    for one in suspects:
        if one["line"] in lines:
            assert one["suggested"] in one["text"]
            assert one["given"] not in one["text"]
    scores = [one["score"] for one in suspects]
    assert scores == sorted(scores)
    assert sum(report["suspects"]["found"].values()) == len(suspects)
    page = (out / "report.md").read_text()
    assert "Likely label errors" in page
    assert f"r.rows.jsonl:{lines[0]}" in page


def test_the_command_writes_what_the_report_lists(
    planted: tuple[dict[str, Any], Path, list[int]], tmp_path: Path
) -> None:
    report, out, _ = planted
    done = invoke("rows", out, "--suspects", tmp_path / "s.csv")
    assert done.exit_code == 0, done.output
    with (tmp_path / "s.csv").open(encoding="utf-8-sig") as file:
        written = [*csv.DictReader(file)]
    assert len(written) == sum(report["suspects"]["found"].values())
    assert [*written[0]] == ["file", "line", "row", "split", "given", "suggested", "score", "text", "word", "position"]
    assert invoke("rows", out, "--suspects", tmp_path / "s.jsonl", "--json").exit_code == 0
    for file, what in (("s.xlsx", "JSON Lines or CSV"), ("no/s.csv", "folder not found")):
        refused = invoke("rows", out, "--suspects", tmp_path / file)
        assert (refused.exit_code, what in refused.output) == (2, True)
    lines = (tmp_path / "s.jsonl").read_text()
    assert lines == (out / "evaluation" / "suspects.jsonl").read_text()


def test_a_run_without_the_key_lists_them_when_asked(tmp_path: Path, built: Any) -> None:
    rows = [{"tokens": [thing, "is", colour], "tags": ["O", "O", "B-COLOUR"]} for thing in THINGS for colour in COLOURS]
    rows += [
        {"tokens": ["the", *row["tokens"], str(i)], "tags": ["O", *row["tags"], "O"]} for i, row in enumerate(rows)
    ]
    rows[4]["tags"] = ["B-COLOUR", "O", "O"]
    path = recipe_for(tmp_path / "tags.yaml", built("bert"), rows, data={"deduplicate": "none"}, train=BRIEF)
    path.write_text(path.read_text().replace("task: classify", "task: token-classify"))
    _, out = run(path)
    done = invoke("rows", out, "--suspects", tmp_path / "s.jsonl")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert (5, 2, rows[4]["tokens"][2], "O", "B-COLOUR") in [
        (one["line"], one["position"], one["word"], one["given"], one["suggested"]) for one in found
    ]
    assert not (out / "evaluation" / "suspects.jsonl").exists()


def test_rows_with_several_labels_are_checked_class_by_class(tmp_path: Path, built: Any) -> None:
    rows = [
        {"text": f"{one} and {other} {thing} {i}", "label": sorted({one, other})}
        for i, thing in enumerate(THINGS * 3)
        for one in COLOURS
        for other in COLOURS
    ]
    rows[10]["label"] = [name for name in COLOURS if name not in rows[10]["label"]]
    _, out = run(recipe_for(tmp_path / "r.yaml", built("bert"), rows, **SETS))
    suspects = [json.loads(line) for line in (out / "evaluation" / "suspects.jsonl").read_text().splitlines()]
    own = {(one["given"], one["suggested"]) for one in suspects if one["line"] == 11}
    assert own
    assert all(given in (f"not {suggested}",) or suggested == f"not {given}" for given, suggested in own)


def test_a_label_is_judged_by_a_regression_that_did_not_see_its_group() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(60, 80)).astype(np.float32)  # enough features to learn any labels by heart
    labels = draw.integers(0, 2, 60)
    seen = LogisticRegression(C=0.01, max_iter=1000).fit(features, labels).predict_proba(features)
    twice, groups = np.concatenate([features, features]), np.tile(np.arange(60), 2)
    found = {n: share for n, _, share in find_errors(twice, np.tile(labels, 2), groups, 0)[0]}
    assert found
    assert max(found.values()) < 0.5
    assert min(seen[n % 60, labels[n % 60]] for n in found) > min(found.values())
    assert {n % 60 for n in found if n < 60} == {n % 60 for n in found if n >= 60}


def grouped_classes(groups_each: int, classes: int = 12, rows: int = 360) -> tuple[Any, Any, Any]:
    """Return features that show the class and the group of each row, classes, and groups with one class each."""
    draw = np.random.default_rng(0)
    labels, numbers = np.arange(rows) % classes, np.arange(rows) // classes
    groups = labels * groups_each + numbers % groups_each
    shifts = draw.normal(size=(classes * groups_each, 16)) / 2
    features = draw.normal(size=(classes, 16))[labels] * 2 + shifts[groups] + draw.normal(size=(rows, 16))
    return features.astype(np.float32), labels, groups


@pytest.mark.parametrize("groups_each", [1, 2, 3, 5])
def test_right_labels_of_classes_with_few_groups_are_not_listed(groups_each: int) -> None:
    features, labels, groups = grouped_classes(groups_each)
    errors, unchecked = find_errors(features, labels, groups, 0)
    assert len(errors) <= 2
    assert unchecked == (dict.fromkeys(range(12), 30) if groups_each == 1 else {})


def test_only_the_class_in_one_group_is_left_out_and_errors_of_others_are_found() -> None:
    features, labels, groups = grouped_classes(6)
    groups[labels == 7] = 1000
    wrong = np.flatnonzero(labels == 3)[:4]
    labels[wrong] = 4
    errors, unchecked = find_errors(features, labels, groups, 0)
    assert unchecked == {7: 30}
    assert len({n for n, *_ in errors} & {*wrong.tolist()}) >= 3
    assert len(errors) <= 6


def test_a_yes_or_no_question_whose_yes_is_in_one_group_is_not_checked() -> None:
    features, labels, groups = grouped_classes(6)
    groups[labels == 7] = 1000
    assert find_errors(features, (labels == 7).astype(int), groups, 0) == ([], {1: 30})
    assert find_errors(features, (labels == 3).astype(int), groups, 0) == ([], {})


def test_one_class_or_one_group_has_no_suspects() -> None:
    features, groups = np.eye(8, dtype=np.float32), np.arange(8)
    assert find_errors(features, np.zeros(8, dtype=np.int64), groups, 0) == ([], {})
    assert find_errors(features, np.arange(8) % 2, np.zeros(8, dtype=np.int64), 0) == ([], {0: 4, 1: 4})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "token-classify"])
def test_the_report_and_the_command_name_classes_that_cannot_be_checked(task: str, tmp_path: Path, built: Any) -> None:
    rows: list[dict[str, Any]] = [{**row, "by": f"g{i // 3}"} for i, row in enumerate(colour_rows(90))]
    rows += [
        {"text": f"a violet {thing} number {i}", "label": "violet", "by": "last"} for i, thing in enumerate(THINGS)
    ]
    if task == "token-classify":
        rows = [
            {
                "tokens": (words := row["text"].split()),
                "tags": ["O", f"B-{row['label']}", *["O"] * (len(words) - 2)],
                "by": row["by"],
            }
            for row in rows
        ]
    sets = {**SETS, "data": {"deduplicate": "none", "split_by": "by"}, "evaluate": {**SETS["evaluate"]}}
    path = recipe_for(tmp_path / "r.yaml", built("bert"), rows, **sets)
    path.write_text(path.read_text().replace("task: classify", f"task: {task}"))
    report, out = run(path)
    name = "violet" if task == "classify" else "B-violet"
    assert report["suspects"]["unchecked"] == {name: 5}
    assert "violet (5)." in (out / "report.md").read_text()
    assert all(line["given"] != name for line in report["suspects"]["listed"])
    done = invoke("rows", out, "--suspects", tmp_path / "s.jsonl", "--json")
    assert json.loads(done.stdout)["unchecked"] == {name: 5}


def test_without_cleanlab_the_run_ends_at_once_with_the_command(
    tmp_path: Path, built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path / "r.yaml", built("bert"), colour_rows(), **SETS)
    monkeypatch.setattr("llmtune.recipe.extras.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmtune-cli\[labels\]'"):
        require_labels(load_recipe(recipe).recipe)
    done = invoke("run", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 4
    assert not (tmp_path / "run" / "run.json").exists()


def test_numbers_and_texts_have_no_labels_to_check(tmp_path: Path, built: Any) -> None:
    rows = [{"text": f"a {thing} {i}", "label": i * 0.5} for i in range(8) for thing in THINGS]
    recipe = recipe_for(tmp_path / "r.yaml", built("bert"), rows, **SETS)
    with pytest.raises(RecipeError, match="the labels are numbers"):
        run(recipe)
    assert not (tmp_path / "r.run" / "adapter").exists()
    recipe.write_text(recipe.read_text().replace("task: classify", "task: chat"))
    with pytest.raises(RecipeError, match=r"'evaluate.suspects' has no effect with task: chat"):
        load_recipe(recipe)


def test_suspects_name_file_line_and_row_in_every_format(tmp_path: Path) -> None:
    texts = [f"a {thing}\nand {i}" for i, thing in enumerate(THINGS[:6])]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, COLOURS[i % 2]) for i, text in enumerate(texts))])
    rows = [{"text": f"the {text}", "label": COLOURS[i % 2]} for i, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    files = [{"path": str(tmp_path / name)} for name in ("a.csv", "b.parquet")]
    held = {"validation": 0, "test": 0, "deduplicate": "none"}
    recipe = recipe_for(tmp_path / "r.yaml", tmp_path, tmp_path / "a.csv", data={"train": files, **held})
    found = prepare_rows(load_recipe(str(recipe)).recipe, tmp_path / "out", Console(quiet=True))
    errors = {(split, number): [(None, "red", "blue", 0.1)] for split in SPLITS for number in range(12)}
    suspects = {(Path(one.file).name, one.line, one.row) for one in add_texts(errors, found, get_task("classify"))}
    lines = [("a.csv", 2 + 2 * i, None if i == 0 else 2 + i) for i in range(6)]
    assert suspects <= {*lines, *(("b.parquet", None, 1 + i) for i in range(6))}
    assert len(suspects) >= 8  # rows of test may be dropped from train
