"""Classes that are new, lost or renamed since the champion: found, judged, named."""

import io
import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import classifying, families
from support.classifying import scored
from support.rows import prepare, write_jsonl

from llmtune.errors import GateFailed, GateUnsure
from llmtune.evaluate.class_changes import find_changes_of_classes, find_stopped, score_new_classes, suggest_renames
from llmtune.evaluate.class_sentences import list_class_changes
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.verdict import judge_challenger
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.records import Difference
from llmtune.report.terminal import print_scores
from llmtune.store.score_records import Champion, ClassChanges, Evaluation, NewClass, Slice

THINGS = ("cat", "dog", "bird", "fish", "fox")
CHAMPION = scored(["blue", "green", "red"], ["red"], ["red"], "the champion")


def rows_of_colours(count: int, start: int = 0, **labels: str) -> list[dict[str, str]]:
    """Return `count` different rows of each colour, with its label."""
    return [
        {"text": f"the {colour} {THINGS[i % 5]} number {i * 7 + start}", "label": label}
        for i in range(count)
        for colour, label in labels.items()
    ]


def made(folder: Path, rows: list[dict[str, str]]) -> Any:
    write_jsonl(folder / "rows.jsonl", rows)
    return prepare(folder, "rows.jsonl", "classify", out="data/rows", test=0.3)


def test_new_lost_and_renamed_classes_are_told_apart(tmp_path):
    rows = made(tmp_path, rows_of_colours(10, blue="blue", green="green", black="black"))
    changes = find_changes_of_classes(CHAMPION, rows, {})
    assert ([one.label for one in changes.new], changes.lost) == (["black"], ("red",))
    changes = find_changes_of_classes(CHAMPION, rows, {"red": "black"})
    assert (changes.new, changes.lost, changes.renamed) == ((), (), {"red": "black"})
    numbers = replace(CHAMPION, evaluation=replace(CHAMPION.evaluation, details={}))
    numbers = replace(numbers, recipe=numbers.recipe.model_copy(update={"classify": None}))
    assert find_changes_of_classes(numbers, rows, {}) is None


def test_a_class_has_stopped_if_new_rows_without_it_are_unlikely(tmp_path):
    before = rows_of_colours(20, blue="blue", green="green", red="red")
    made(tmp_path / "champion", before)
    none = ClassChanges()
    few = made(tmp_path / "few", before + rows_of_colours(2, 3, blue="blue"))
    assert find_stopped(CHAMPION, tmp_path / "champion", few, none) == []
    renamed = rows_of_colours(10, 3, blue="blue", green="green", red="rot")
    many = made(tmp_path / "many", before + renamed)
    assert find_stopped(CHAMPION, tmp_path / "champion", many, none) == ["red"]
    assert find_stopped(CHAMPION, None, many, ClassChanges(lost=("green",))) == ["green"]
    alone = made(tmp_path / "alone", before + rows_of_colours(30, 3, black="black"))
    assert find_stopped(CHAMPION, tmp_path / "champion", alone, none) == []


@pytest.mark.parametrize(
    ("answers", "hints"),
    [
        (["red"] * 7 + ["blue"] * 3, [("rot", "red", 7, 10)]),
        (["red"] * 5 + ["blue"] * 5, []),
        (["blue"] * 10, []),
    ],
)
def test_a_new_class_that_the_champion_mostly_calls_a_stopped_one_may_be_its_new_name(tmp_path, answers, hints):
    rows = made(tmp_path, rows_of_colours(10, red="rot", blue="blue"))
    assert [*suggest_renames(rows, ["rot"], ["red"], lambda some: [[answers[at]] for at in range(len(some))])] == hints
    rare = made(tmp_path / "rare", [*rows_of_colours(3, red="rot"), *rows_of_colours(9, blue="blue")])
    assert [*suggest_renames(rare, ["rot"], ["red"], lambda some: [["red"]] * len(some))] == []


@pytest.mark.parametrize(
    ("right", "total", "verdict"),
    [(30, 30, "learned"), (0, 30, "not learned"), (15, 30, "inconclusive"), (9, 9, "too few rows")],
)
def test_a_new_class_is_judged_by_the_interval_of_its_recall(right, total, verdict):
    references = ["new"] * total + ["old"] * 20
    own = scored(["new", "old"], ["new"] * right + ["old"] * (total - right + 20), references)
    (one,) = score_new_classes(ClassChanges(new=(NewClass("new", total, ""),)), own).new
    assert (one.rows, one.verdict) == (total, verdict)
    assert one.scores["recall"].value == right / total
    assert one.scores["recall"].low <= right / total <= one.scores["recall"].high
    assert ("precision" in one.scores) == (right > 0)


def test_a_class_without_test_rows_or_metrics_by_class_is_said_to_have_too_few_rows():
    own = scored(["new", "old"], ["old"] * 20, ["old"] * 20)
    (one,) = score_new_classes(ClassChanges(new=(NewClass("new", 0, ""),)), own).new
    assert (one.rows, one.verdict, one.scores) == (0, "too few rows", {})
    table = {"tuned": {"classes": [{"label": "new", "precision": 1.0, "recall": 0.9, "f1": 0.95, "support": 20}]}}
    plain = scored(["new", "old"], ["old"] * 20, ["old"] * 20, metrics=("accuracy",))
    plain = replace(plain, evaluation=replace(plain.evaluation, details=table))
    (one,) = score_new_classes(ClassChanges(new=(NewClass("new", 20, ""),)), plain).new
    assert one.verdict == "learned"
    assert math.isnan(one.scores["f1"].low)


def change(value: float, low: float, high: float, p: float, rows: int = 100) -> Difference:
    return Difference(value, low, high, p, rows)


BETTER, EVEN = change(0.1, 0.05, 0.15, 1e-4), change(0.0, -0.02, 0.02, 1.0)
WORSE = change(-0.1, -0.15, -0.05, 1e-4)


def challenged(difference: Difference, known: Difference, *new: NewClass) -> Champion:
    part = Slice("classes of the champion", 80, {"accuracy": 0.9}, {"accuracy": 0.9 + known.value}, {"accuracy": known})
    changes = ClassChanges(new, ("gone",), known=part)
    scores = {"accuracy": 0.8}, {"accuracy": difference}, {}, {"accuracy": 0.8 + difference.value}
    return Champion("champion", *scores, rows=100, classes=changes)


ON_KNOWN = "On the 80 rows of the champion's classes it is worse in accuracy."
LEARNED, UNLEARNED = (NewClass("new", 20, word) for word in ("learned", "not learned"))


@pytest.mark.parametrize(
    ("champion", "word", "reason"),
    [
        (challenged(BETTER, EVEN, LEARNED), "better", "Classes of the champion without rows now: 'gone'."),
        (
            challenged(BETTER, WORSE, LEARNED),
            "mixed",
            ON_KNOWN,
        ),
        (
            challenged(EVEN, WORSE, LEARNED),
            "worse",
            ON_KNOWN,
        ),
        (challenged(BETTER, EVEN, UNLEARNED), "mixed", "New classes, not learned: 'new'."),
    ],
)
def test_a_gain_on_new_classes_does_not_hide_a_loss_on_others_in_the_verdict(champion, word, reason):
    found = judge_challenger(champion, (), 0.05, {"accuracy": 1})
    assert found.word == word
    assert reason in found.reason


def test_a_gate_on_the_champion_holds_on_all_rows_and_on_those_of_its_classes():
    section = EvaluateSection(gates=("accuracy.low > champion - 0.1", "accuracy >= 0.5"))
    for known, passed in ((EVEN, True), (WORSE, False)):
        evaluation = Evaluation({}, {"accuracy": 0.9}, {}, (), 100, champion=challenged(BETTER, known, LEARNED))
        first, second = check_gates(section, evaluation)
        assert (first.passed, second.passed) == (passed, True)
        assert ("on the 80 rows of the champion's classes" in first.note) == (not passed)


def test_a_hint_is_a_question_with_the_line_to_write():
    (sentence,) = list_class_changes(ClassChanges(hints=(("Zu gang", "Konto", 41, 50),)), "classify.rename")
    assert sentence.startswith("'Zu gang' appeared as 'Konto' stopped, and the champion answers 'Konto' for 41 of 50")
    assert sentence.endswith('If so, set classify.rename: {Konto: "Zu gang"}.')


def train(folder: Path, model: Path, name: str, rows: list[dict[str, str]], **sections: Any) -> dict[str, Any]:
    """Return the report of a run against the champion, if it is there, with the printed lines as `printed`."""
    evaluate: dict[str, Any] = {"metrics": ["loss", "accuracy", "f1_macro", "auroc", "brier"]}
    if name != "champion":
        gates = ["accuracy.low > champion - 0.3"]
        evaluate |= {"champion": str(folder / "champion"), "gates": gates, "when_unsure": "report"}
    about = {"adapter": {"method": "full"}, "train": {"num_train_epochs": 8}, "evaluate": evaluate}
    data = {"data": {"test": 0.3, "validation": 0.1}}
    path = classifying.recipe_for(folder / f"{name}.yaml", model, rows, **about, **data, **sections)
    console = Console(file=io.StringIO(), width=300)
    with suppress(GateFailed, GateUnsure):
        classifying.run(path, folder / name, console)
    report: dict[str, Any] = json.loads((folder / name / "report.json").read_text())
    return {**report, "printed": console.file.getvalue(), "junit": (folder / name / "junit.xml").read_text()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weeks_with_a_new_a_renamed_and_a_lost_class_are_compared_with_the_champion(tmp_path):
    model, colours = families.build_bert(tmp_path / "bert"), {"red": "red", "green": "green", "blue": "blue"}
    before = rows_of_colours(40, **colours)
    train(tmp_path, model, "champion", before)

    new = train(tmp_path, model, "new", before + rows_of_colours(40, 3, black="black"))
    compared = new["evaluation"]["champion"]
    assert compared["difference"]["accuracy"]["n"] == compared["difference"]["f1_macro"]["n"] == compared["rows"]
    assert compared["rows"] == new["evaluation"]["rows"], "no row is left out"
    (black,) = compared["classes"]["new"]
    assert (black["label"], black["verdict"]) == ("black", "learned")
    assert compared["classes"]["known"]["rows"] == compared["rows"] - black["rows"]
    assert compared["partial"]["loss"].startswith(f"{black['rows']} of {compared['rows']} rows are left out")
    assert 'name="champion.new_class.black" value="learned: ' in new["junit"]
    assert "appeared" not in new["printed"], "no other class stopped"
    page = (tmp_path / "new" / "report.html").read_text()
    assert "Classes that the champion does not have, tuned model" in page

    week = rows_of_colours(25, 5, **(colours | {"red": "rot"}))
    renamed = train(tmp_path, model, "renamed", before + week)
    assert renamed["evaluation"]["champion"]["classes"]["hints"] == [["rot", "red", 25, 25]]
    assert "If so, set classify.rename: {red: rot}." in renamed["printed"]
    assert "'rot' may be the new name of 'red'." in renamed["verdict"]["reason"]

    told = train(tmp_path, model, "told", before + week, classify={"rename": {"red": "rot"}})
    compared = told["evaluation"]["champion"]
    assert compared["classes"] | {"renamed": {"red": "rot"}, "new": [], "lost": [], "hints": []} == compared["classes"]
    assert compared["rows"] == told["evaluation"]["rows"] == compared["difference"]["loss"]["n"]
    assert compared["scores"]["accuracy"] > 0.9, "the champion's answers have the new name too"
    assert told["verdict"]["word"] == "better"

    lost = train(tmp_path, model, "lost", [row for row in before if row["label"] != "red"])
    assert lost["evaluation"]["champion"]["classes"]["lost"] == ["red"]
    assert "f1_macro" in lost["evaluation"]["champion"]["difference"]
    assert "Classes of the champion without rows now: 'red'." in lost["verdict"]["reason"]


@pytest.mark.parametrize(
    ("task", "key"), [("classify", "classify.rename"), ("token-classify", "token_classify.rename")]
)
def test_the_terminal_names_the_key_that_renames_a_class(task: str, key: str) -> None:
    changes = ClassChanges(hints=(("Setup", "Config", 41, 50),))
    champion = Champion("release:tiny@0a1b2c3d", {}, {}, {}, rows=50, classes=changes)
    console = Console(file=io.StringIO(), width=300)
    print_scores(Evaluation({}, {"accuracy": 0.5}, {}, (), 50, champion=champion), console, task)
    assert f"If so, set {key}: {{Config: Setup}}." in console.file.getvalue()
