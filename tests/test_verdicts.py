"""A model that learned, a deliberately worse one and an unchanged one: verdict, gates and exit codes."""

import json
import random
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.runs import invoke, write_recipe
from typer.testing import Result

ANSWERS = {"cat": "red", "dog": "green", "bird": "blue", "fish": "black"}
WRONG = dict(zip(ANSWERS, [*ANSWERS.values()][1:] + [*ANSWERS.values()][:1], strict=True))
LEARNING: dict[str, Any] = {"method": "full", "r": None, "lora_alpha": None}
TRAINING: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 16, "num_train_epochs": 8, "logging_steps": 10}
MEASURED: dict[str, Any] = {
    "metrics": ["loss", "exact_match", "choice_accuracy"],
    "gates": ["choice_accuracy.low > base", "exact_match >= 0.9"],
}


def write_rows(path: Path, answers: dict[str, str], numbers: range) -> Path:
    rows = [(f"{animal} {number}", answer) for number in numbers for animal, answer in answers.items()]
    random.Random(0).shuffle(rows)
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in rows]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    write_rows(folder / "right.jsonl", ANSWERS, range(60))
    write_rows(folder / "wrong.jsonl", WRONG, range(60))
    write_rows(folder / "test.jsonl", ANSWERS, range(60, 75))
    rows = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "reversed.jsonl").write_text("".join(reversed(rows)))
    return folder


def run(place: Path, name: str, model: Path, rows: str, test: str = "test.jsonl", **sections: Any) -> Result:
    """Run a recipe of its own in this process."""
    data = {"validation": 0.0, "test": str(place / test), "deduplicate": "none"}
    sections = {"adapter": LEARNING, "train": TRAINING, "evaluate": MEASURED, **sections}
    recipe = write_recipe(place / f"{name}.yaml", model, place / rows, data=data, name=name, **sections)
    return invoke("run", recipe, "--out", place / name)


@pytest.fixture(scope="module")
def learned(place: Path, tiny_llama: Path) -> Result:
    return run(place, "learned", tiny_llama, "right.jsonl")


@pytest.fixture(scope="module")
def harmed(place: Path, learned: Result) -> Result:
    """The model that learned, trained further with answers about another animal."""
    return run(place, "harmed", place / "learned" / "weights", "wrong.jsonl")


@pytest.fixture(scope="module")
def unchanged(place: Path, learned: Result) -> Result:
    """The model that learned, with a barely trained adapter; the test rows are in another order."""
    sections = {"adapter": {"r": 2, "lora_alpha": 2}, "train": {"num_train_epochs": 0.1, "learning_rate": 1e-9}}
    gates = {**MEASURED, "gates": []}
    model = place / "learned" / "weights"
    return run(place, "unchanged", model, "right.jsonl", "reversed.jsonl", evaluate=gates, **sections)


def report(place: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / name / "report.json").read_text())
    return found


def test_a_model_that_learned_helped_and_its_gates_pass(place: Path, learned: Result) -> None:
    assert learned.exit_code == 0, learned.stderr
    found = report(place, "learned")
    assert found["verdict"]["word"] == "better", found["verdict"]
    assert all(gate["passed"] for gate in found["gates"])
    suite = ElementTree.parse(place / "learned" / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")


def test_a_deliberately_worse_model_did_harm_and_exits_with_6(place: Path, harmed: Result) -> None:
    assert harmed.exit_code == 6, harmed.stderr
    assert "choice_accuracy.low > base" in harmed.stderr
    assert "Traceback" not in harmed.stderr
    found = report(place, "harmed")
    assert found["verdict"]["word"] == "worse", found["verdict"]
    assert found["evaluation"]["flips"]["exact_match"]["lost"] > 50
    suite = ElementTree.parse(place / "harmed" / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")
    assert {case.get("name") for case in suite.iter("testcase")} == set(MEASURED["gates"])
    assert "worse, 2 of 2 gates failed" in (place / "harmed" / "report.md").read_text()


def test_an_unchanged_model_is_inconclusive(place: Path, unchanged: Result) -> None:
    assert unchanged.exit_code == 0, unchanged.stderr
    found = report(place, "unchanged")
    assert found["verdict"]["word"] == "inconclusive", (found["verdict"], found["evaluation"]["difference"])
    assert found["evaluation"]["flips"]["exact_match"]["gained"] == 0


def challenge(place: Path, name: str, champion: str, folder: Path, *gates: str) -> Result:
    """Score a copy of a run again, compared with a champion."""
    shutil.copytree(place / name, folder)
    sets = [f"evaluate.champion={place / champion}", "evaluate.when_unsure=report", f"evaluate.gates={[*gates]}"]
    options = [word for value in sets for word in ("--set", value)]
    return invoke("evaluate", folder, *options)


def test_an_unchanged_model_is_not_worse_than_the_champion_and_not_shown_better(
    place: Path, unchanged: Result, tmp_path: Path
) -> None:
    passed = challenge(place, "unchanged", "learned", tmp_path / "same", "choice_accuracy.low > champion - 0.1")
    assert passed.exit_code == 0, passed.stderr
    verdict = json.loads((tmp_path / "same" / "report.json").read_text())["verdict"]
    assert verdict["word"] == "within margin"
    assert f"within margin: {verdict['reason']} 1 gate passed." in " ".join(passed.stderr.split())
    options = ["--set", "evaluate.gates=['choice_accuracy.low > champion']"]
    better = invoke("evaluate", tmp_path / "same", *options)
    assert better.exit_code == 7, better.stderr
    assert "evaluate unchanged, skipped" in better.stderr


def test_a_deliberately_worse_model_fails_against_the_champion(place: Path, harmed: Result, tmp_path: Path) -> None:
    done = challenge(place, "harmed", "learned", tmp_path / "worse", "choice_accuracy.low > champion - 0.05")
    assert done.exit_code == 6, done.stderr
    (gate,) = json.loads((tmp_path / "worse" / "report.json").read_text())["gates"]
    assert (gate["passed"], gate["note"]) == (False, "")
    again = invoke("evaluate", tmp_path / "worse", "--json")
    assert again.exit_code == 6, again.stderr
    printed = json.loads(again.stdout)
    assert printed["verdict"]["word"] == "worse"
    assert printed["error"]["exit_code"] == 6
    assert printed["error"]["problems"][0]["where"] == gate["name"]


def test_eight_test_rows_are_inconclusive_and_the_rows_needed_are_named(
    place: Path, learned: Result, tmp_path: Path
) -> None:
    lines = (place / "test.jsonl").read_text().splitlines(keepends=True)
    (place / "eight.jsonl").write_text("".join(lines[:8]))
    sections = {"adapter": {"r": 2, "lora_alpha": 2}, "train": {"num_train_epochs": 0.1, "learning_rate": 1e-9}}
    measured = {**MEASURED, "gates": []}
    model = place / "learned" / "weights"
    assert run(place, "eight", model, "right.jsonl", "eight.jsonl", evaluate=measured, **sections).exit_code == 0
    folder = tmp_path / "again"
    done = challenge(place, "eight", "eight", folder, "choice_accuracy.low > champion - 0.01")
    assert done.exit_code == 7, done.stderr
    repeated = invoke("evaluate", folder, "--json")
    printed = json.loads(repeated.stdout)
    assert (printed["verdict"]["word"], printed["error"]["exit_code"]) == ("inconclusive", 7)
    assert printed["champion"]["scores"]["choice_accuracy"]["difference"]
    assert "8 rows are too few; about" in " ".join(done.stderr.split())
    (gate,) = json.loads((folder / "report.json").read_text())["gates"]
    assert gate["passed"] is None
    power = json.loads((folder / "report.json").read_text())["power"][0]
    assert power["gate"] == gate["name"]
    assert f"about {power['rows_needed']:,} would tell" in gate["note"]
    suite = ElementTree.parse(folder / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    assert "1 of 1 gate inconclusive" in (folder / "report.md").read_text()
    planned = [*("--set", f"evaluate.champion={place / 'eight'}", "--dry-run", "--json")]
    gates = ["--set", "evaluate.gates=['choice_accuracy.low > champion - 0.01']"]
    dry = invoke("run", place / "eight.yaml", "--out", tmp_path / "new", *planned, *gates)
    assert dry.exit_code == 0, dry.stderr
    assert json.loads(dry.stdout)["plan"]["power"]["rows"][0]["rows_needed"] > 1000
    assert "Planned by how far the champion and its own base differ" in " ".join(dry.stderr.split())
