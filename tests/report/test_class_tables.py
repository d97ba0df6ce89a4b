"""Classes one by one: in the page, in Markdown and on the terminal; and what stands for a base model without a head."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from llmtune.evaluate.score_table import print_scores
from llmtune.recipe import Recipe
from llmtune.records import Difference, Evaluation
from llmtune.report import write_report
from llmtune.report.assembly import assemble
from llmtune.report.class_tables import MOST_CELLS, class_counts, class_scores, confused_pairs, confusion

EVALUATION = Evaluation(
    base={"accuracy": 0.4},
    tuned={"loss": 0.5, "accuracy": 0.8},
    difference={"accuracy": Difference(0.4, 0.3, 0.5, 0.001, 100)},
    gates=(),
    samples=(),
    rows=100,
    baseline="the most frequent class",
    details={"tuned": {"classes": []}},
)


def write(report, folder):
    write_report(report, folder)
    return {name: (folder / name).read_text() for name in ("report.html", "report.md", "report.json", "junit.xml")}


def printed(evaluation):
    console = Console(file=io.StringIO(), width=120)
    print_scores(evaluation, console)
    return console.file.getvalue()


def test_the_baseline_is_named_and_its_column_is_not_that_of_a_model(headed, tmp_path):
    texts = write(headed, tmp_path)
    page, short = texts["report.html"], texts["report.md"]
    assert '<th class="num">baseline</th>' in page
    assert "The baseline is <strong>the most frequent class</strong>, and no model" in page
    assert ">base<" not in page
    assert "Both models answered" not in page
    assert "| metric | baseline | tuned |" in short
    assert "The baseline is `the most frequent class`, and no model" in short
    assert "than the most frequent class" in short.splitlines()[2]
    assert 'name="baseline" value="the most frequent class"' in texts["junit.xml"]


def test_a_base_model_is_called_base(report, tmp_path):
    texts = write(report, tmp_path)
    assert '<th class="num">base</th>' in texts["report.html"]
    assert "The baseline is" not in texts["report.html"]
    assert "baseline" not in texts["report.md"] + texts["junit.xml"]


def test_a_metric_of_the_tuned_model_alone_stands_with_dashes(headed, tmp_path):
    texts = write(headed, tmp_path)
    assert "| `loss` | – | 0.5200 | – | – | – | – | – |" in texts["report.md"]
    assert "A dash: measured of the tuned model alone" in texts["report.html"]
    assert ">0.5200<" in texts["report.html"]
    (line,) = [line.split() for line in printed(EVALUATION).splitlines() if "loss" in line]
    assert line == ["loss", "–", "0.5000", "–", "–", "–"]


def test_the_terminal_names_the_baseline_under_the_table():
    lines = printed(EVALUATION).splitlines()
    assert any(line.split()[:3] == ["metric", "baseline", "tuned"] for line in lines)
    assert lines[-1].startswith("baseline: the most frequent class; no model")
    other = printed(replace(EVALUATION, baseline=None))
    assert "baseline" not in other
    assert "base" in other


def test_scores_without_anything_beside_them_are_printed():
    assert "0.5000" in printed(replace(EVALUATION, base={}, difference={}))
    assert "none of the metrics" in printed(Evaluation({}, {}, {}, (), (), 0))


def test_classes_and_their_confusion_are_on_the_page(headed, tmp_path):
    texts = write(headed, tmp_path)
    page = texts["report.html"]
    assert 'aria-label="confusion matrix of 3 classes: 83 of 100 rows right"' in page
    assert "<title>delivery taken for billing: 11 rows, 25.6%</title>" in page
    assert "F1 of baseline" in page
    assert "| `billing` | 43 | 0.8000 | 0.9000 | 0.6000 | 0.8500 |" in texts["report.md"]
    assert "- `delivery` for `billing`: 11 rows, 25.6 % of all" in texts["report.md"]


def test_the_most_frequent_class_comes_first_with_the_f1_of_the_base_beside(headed):
    evaluation = headed["evaluation"]
    evaluation["details"]["base"]["classes"].pop()
    found = class_scores(evaluation, "classify")
    assert [row["support"] for row in found["rows"]] == ["43", "43", "14"]
    assert [row["base_f1"] for row in found["rows"]] == ["0.6000", "0.0000", "–"]
    assert class_scores(evaluation, "token-classify")["unit"] == "entities"


def many(size):
    labels = [f"class {k}" for k in range(size)]
    counts = [[9 if i == k else int(k == (i + 1) % size) * (i + 1) for k in range(size)] for i in range(size)]
    return {"details": {"tuned": {"confusion": {"labels": labels, "counts": counts}}}}


def test_more_classes_than_can_be_read_are_told_as_pairs():
    assert confusion(many(MOST_CELLS))["picture"]
    found = confusion(many(MOST_CELLS + 1))
    assert found["picture"] == ""
    assert found["pairs"][0] == {"reference": "class 20", "predicted": "class 0", "rows": "21", "share": "70.0 %"}
    assert [int(pair["rows"]) for pair in found["pairs"]] == list(range(21, 6, -1))


def test_a_class_without_rows_has_no_share():
    assert confused_pairs(["a", "b"], [[0, 0], [2, 0]]) == [
        {"reference": "b", "predicted": "a", "rows": "2", "share": "100.0 %"}
    ]


def test_classes_are_counted_by_side_and_those_without_training_rows_are_marked(headed, tmp_path):
    found = class_counts(headed["data"], "classify")
    assert [row["counts"] for row in found["rows"]] == [["900", "50", "43"], ["300", "20", "43"], ["0", "2", "14"]]
    assert [row["share"] for row in found["rows"]] == ["75.0 %", "25.0 %", "0.0 %"]
    assert found["spread"] == "1 of 3 have no training rows"
    texts = write(headed, tmp_path)
    assert texts["report.html"].count("not in training") == 1
    assert "- classes: 1 of 3 have no training rows: `praise`" in texts["report.md"]


@pytest.mark.parametrize(
    ("counts", "words"),
    [((900, 300), "the largest has 3 times the rows of the smallest"), ((100, 101), "evenly spread")],
)
def test_imbalance_is_said_in_words(counts, words):
    classes = {f"c{i}": {"train": number} for i, number in enumerate(counts)}
    assert class_counts({"classes": classes}, "classify")["spread"] == words


def test_no_share_of_tokens_is_told_where_no_tokens_are_guessed(headed, tmp_path):
    texts = write(headed, tmp_path)
    assert "tokens are learned" not in texts["report.html"]
    assert "tokens learned" not in texts["report.md"]


@pytest.mark.parametrize("section", ["details", "baseline"])
def test_the_report_of_an_older_run_is_written(headed, tmp_path, section):
    del headed["evaluation"][section], headed["data"]["classes"]
    assert json.loads(write(headed, tmp_path)["report.json"])["verdict"]["word"] == "helped"


def test_baseline_details_and_classes_stand_in_the_json():
    recipe = Recipe.model_validate(
        {"recipe_version": 1, "task": "classify", "data": {"train": "x"}, "model": {"name": "m"}}
    )
    facts = {"rows_in": 1, "kept": {}, "dropped": {}}
    encode = {key: {} for key in ("examples", "tokens", "supervised", "longest", "histogram", "example")}
    encode |= {"dropped": {}, "supervised_share": None, "classes": {"a": {"train": 1}}}
    steps = {name: {"state": "done", "facts": found} for name, found in (("prepare", facts), ("encode", encode))}
    found = assemble(
        recipe,
        {"steps": steps, "fingerprint": "x"},
        recipe_yaml="",
        timings=[],
        curve=[],
        evaluation=EVALUATION,
        gates=[],
        hardware={},
    )
    assert found["evaluation"]["baseline"] == "the most frequent class"
    assert found["evaluation"]["details"] == {"tuned": {"classes": []}}
    assert found["data"]["classes"] == {"a": {"train": 1}}
