"""Rows that are new to the champion: scored, judged and gated apart; their labels are compared before training."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.classifying import COLOURS, THINGS, colour_rows, recipe_for
from support.rows import write_jsonl
from support.runs import invoke

from llmtune.deploy.releases import make_release

GATES = ["accuracy[new] >= 0.6", "accuracy[new].low > champion - 0.5", "accuracy[new] > base"]
ADAPTER = {"method": "full"}
DATA = {"validation": 0.0, "test": 0.3, "deduplicate": "none"}


def week_rows(*, shuffled: bool) -> list[dict[str, Any]]:
    """Return rows with other texts than `colour_rows`."""
    labels = [COLOURS[i % 3] for i in range(120)]
    if shuffled:
        random.Random(0).shuffle(labels)
    return [{"text": f"a {COLOURS[i % 3]} {THINGS[i % 5]} of week {i * 3}", "label": labels[i]} for i in range(120)]


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory, built: Any) -> Path:
    """A run that knows its colours, and next to it the weeks that follow."""
    folder = tmp_path_factory.mktemp("weeks")
    recipe = recipe_for(folder / "champion.yaml", built("bert"), colour_rows(240), data=DATA, adapter=ADAPTER)
    for name, shuffled in (("good", False), ("bad", True)):
        write_jsonl(folder / f"{name}.jsonl", week_rows(shuffled=shuffled))
    assert invoke("run", recipe, "--out", folder / "champion", "--offline").exit_code == 0
    return folder / "champion"


def read_report(done: Any) -> Any:
    return json.loads(Path(json.loads(done.stdout)["reports"]["json"]).read_text())


def run_week(champion: Path, out: Path, rows: str, built: Any, against: Path | None = None, **settings: Any) -> Any:
    """Run a week: the champion's rows and a further file."""
    place = champion.parent
    judged = {"metrics": ["accuracy", "loss"], "champion": str(against or champion), "gates": GATES, **settings}
    train = [str(place / "champion.rows.jsonl"), str(place / rows)]
    recipe = recipe_for(
        out.with_suffix(".yaml"),
        built("bert"),
        place / rows,
        data={**DATA, "train": train},
        adapter=ADAPTER,
        evaluate={name: value for name, value in judged.items() if value is not None},
    )
    return invoke("run", recipe, "--out", out, "--offline", "--json")


@pytest.mark.needs("cleanlab")
def test_a_week_with_wrong_labels_is_named_before_training_and_fails_on_its_new_rows(
    champion: Path, tmp_path: Path, built: Any
) -> None:
    done = run_week(champion, tmp_path / "bad", "bad.jsonl", built, suspects=True)
    assert done.exit_code == 6, done.stderr
    told = " ".join(done.stderr.split())
    assert told.index("bad.jsonl: ") < told.index("step 1"), "before training"
    assert "labels that the champion never saw differ from its predictions" in told
    assert "far more than expected" in told
    report = read_report(done)
    verdict, new = report["verdict"], report["evaluation"]["champion"]["new"]
    assert verdict["word"] == "worse", verdict
    assert "bad.jsonl" in verdict["reason"]
    assert new["scores"]["rows"] == new["rows"] == report["evaluation"]["champion"]["asked"] > 15
    assert new["tuned"]["accuracy"] == new["scores"]["tuned"]["accuracy"] < 0.6
    assert new["difference"]["accuracy"]["n"] == new["rows"]
    assert new["from_old"]["accuracy"]["interval"][1] < 0
    gates = {gate["name"]: gate["passed"] for gate in report["gates"]}
    assert gates["accuracy[new] >= 0.6"] is False
    assert "New rows" in (tmp_path / "bad" / "report.html").read_text()
    assert "Rows that are new to the champion" in (tmp_path / "bad" / "report.md").read_text()
    suite = ElementTree.parse(tmp_path / "bad" / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    names = {one.get("name") for one in suite.iter("property")}
    assert {"new.rows", "tuned.accuracy[new]", "champion.accuracy[new]", "base.accuracy[new]"} <= names


def test_a_week_with_wrong_labels_is_promoted_only_with_the_line_that_it_prints(
    champion: Path, tmp_path: Path, built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_week(champion, Path("bad"), "bad.jsonl", built, gates=["accuracy >= 0.1"])
    document, told = json.loads(done.stdout), " ".join(done.stderr.split())
    assert (done.exit_code, [gate["passed"] for gate in document["gates"]]) == (7, [True, None]), told
    suite = ElementTree.parse("bad/junit.xml").getroot()[0]
    stated = {one.get("name"): one.get("value") for one in suite.iter("property")}
    for facts in (document["properties"], read_report(done)["properties"], stated):
        assert facts["doubtful_files"].startswith("bad.jsonl: 82 of 120 labels")
    assert "generate" not in told.split("report: ")[1]
    assert invoke("release", "bad", "--offline").exit_code == 7
    assert not Path("releases").exists()
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("next: If the labels are right: ")]
    words = line.partition("right: llmtune ")[2].split()
    assert words == ["evaluate", "bad", "--set", "evaluate.max_disagreement=1"]
    assert invoke(*words, "--offline").exit_code == 0
    assert invoke("release", "bad", "--offline").exit_code == 0


@pytest.mark.slow
def test_a_week_with_right_labels_passes_its_gates_on_new_rows(champion: Path, tmp_path: Path, built: Any) -> None:
    done = run_week(champion, tmp_path / "good", "good.jsonl", built)
    assert done.exit_code == 0, done.stderr
    assert "far more than expected" not in done.stderr
    report = read_report(done)
    assert [gate["passed"] and gate["applies"] for gate in report["gates"]] == [True, True, True]
    assert report["verdict"]["word"] in ("better", "inconclusive", "within margin")


def test_too_much_disagreement_ends_the_run_before_training_if_the_recipe_says_so(
    champion: Path, tmp_path: Path, built: Any
) -> None:
    done = run_week(champion, tmp_path / "stopped", "bad.jsonl", built, max_disagreement=0.5)
    assert done.exit_code == 3, done.stderr
    told = " ".join(done.stderr.split())
    assert "labels differ from the champion's predictions (evaluate.max_disagreement: 0.5)" in told
    assert "Correct the labels" in told
    assert not (tmp_path / "stopped" / "weights").exists()


def test_gates_on_new_rows_do_not_apply_without_new_rows_a_champion_or_its_rows(
    champion: Path, tmp_path: Path, built: Any
) -> None:
    place = tmp_path / "gone"
    release = make_release(champion, place / "first.json")
    recipe = champion.parent / "champion.yaml"
    cases = {
        "no test row is new to the champion": [f"evaluate.champion={champion}"],
        "the champion's run folder is gone": [f"evaluate.champion={release}"],
        "without a champion, all test rows are new": [],
    }
    for number, (why, sets) in enumerate(cases.items()):
        out = place / f"run{number}"
        shutil.copytree(champion, out)
        words = [word for text in (*sets, "evaluate.gates=['accuracy[new] >= 0.99']") for word in ("--set", text)]
        done = invoke("run", recipe, "--out", out, "--offline", "--json", *words)
        assert done.exit_code == 0, done.stderr
        (gate,) = read_report(done)["gates"]
        assert (gate["passed"], gate["applies"], gate["got"]) == (True, False, "not applicable")
        assert why in gate["note"]
        assert why in " ".join(done.stderr.split())
        assert "1 not applicable" in (out / "report.md").read_text()
        suite = ElementTree.parse(out / "junit.xml").getroot().find("testsuite")
        assert suite is not None
        assert (suite.get("skipped"), suite.get("failures")) == ("1", "0")


def test_rows_of_classes_that_the_champion_does_not_have_are_counted_apart(
    champion: Path, tmp_path: Path, built: Any
) -> None:
    rows = week_rows(shuffled=False)
    for row in rows[::4]:
        row["label"] = "violet"
    write_jsonl(champion.parent / "violet.jsonl", rows)
    done = run_week(champion, tmp_path / "violet", "violet.jsonl", built, max_disagreement=0.5, gates=GATES[:1])
    told = " ".join(done.stderr.split())
    assert "30 more are of classes that it does not have" in told
    assert "far more than expected" not in told
    report = read_report(done)
    new = report["evaluation"]["champion"]["new"]
    assert new["before"]["accuracy"] < 0.9, "it cannot answer violet rows, which count as wrong"


def test_a_column_named_new_is_a_slice_like_any_other(champion: Path, tmp_path: Path, built: Any) -> None:
    rows = [{**row, "new": "yes" if i % 2 else "no"} for i, row in enumerate(week_rows(shuffled=False))]
    write_jsonl(champion.parent / "column.jsonl", rows)
    old = [{**row, "new": "no"} for row in colour_rows(240)]
    write_jsonl(champion.parent / "champion.rows.jsonl", old)
    done = run_week(champion, tmp_path / "column", "column.jsonl", built, slices=["new"], gates=GATES[:1])
    assert done.exit_code == 0, done.stderr
    evaluation = read_report(done)["evaluation"]
    assert {one["value"] for one in evaluation["slices"]["new"]} == {"yes", "no"}
    by_value = {one["value"]: one["rows"] for one in evaluation["slices"]["new"]}
    assert evaluation["champion"]["new"]["scores"]["rows"] > by_value["yes"]


@pytest.mark.slow
def test_wrong_tags_of_a_new_file_are_named_by_row(tmp_path: Path, built: Any) -> None:
    def tagged(words: str, count: int, *, wrong: bool) -> list[dict[str, Any]]:
        colours = [COLOURS[i % 3] for i in range(count)]
        tags = [["B-COLOUR", "O", "O"] if wrong else ["O", "O", "B-COLOUR"] for _ in colours]
        rows = [[f"{words}{i}", "is", colour] for i, colour in enumerate(colours)]
        return [{"tokens": row, "tags": own} for row, own in zip(rows, tags, strict=True)]

    def write(name: str, rows: Any, **sections: Any) -> Path:
        path = recipe_for(tmp_path / name, built("bert"), rows, adapter=ADAPTER, **sections)
        path.write_text(path.read_text().replace("task: classify", "task: token-classify"))
        return path

    old, bad = tagged("cat", 120, wrong=False), write_jsonl(tmp_path / "bad.jsonl", tagged("dog", 60, wrong=True))
    measured = {"metrics": ["accuracy", "f1"]}
    first = write("first.yaml", old, data=DATA, evaluate=measured)
    assert invoke("run", first, "--out", tmp_path / "first", "--offline").exit_code == 0
    data = {**DATA, "train": [str(tmp_path / "first.rows.jsonl"), str(bad)]}
    judged = {**measured, "champion": str(tmp_path / "first"), "gates": ["accuracy[new] >= 0.5"]}
    second = write("second.yaml", bad, data=data, evaluate={**judged, "max_disagreement": 0.6})
    done = invoke("run", second, "--out", tmp_path / "second", "--offline")
    assert done.exit_code == 3, done.stderr
    assert "60 of 60 labels differ from the champion's predictions" in " ".join(done.stderr.split())
