"""Each task's baseline without a language model: scored on the rows of the tuned model, cached, and used by gates."""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from support.classifying import colour_rows, recipe_for, run
from support.runs import invoke

from llmtune.compare.compare_runs import compare_runs
from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.deploy.releases import make_release
from llmtune.display.number_format import score
from llmtune.errors import GateFailed
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.regression import fit_tfidf
from llmtune.evaluate.release_records import open_release
from llmtune.evaluate.simple_baseline import lead
from llmtune.pipeline import run_pipeline
from llmtune.recipe.gate_grammar import SIMPLE_BASELINES
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.store.run_request import RunRequest


def test_every_baseline_of_a_task_has_metrics_of_the_task():
    for facts in TASK_FACTS.values():
        assert bool(facts.simple_baselines) == bool(facts.baseline_metrics)
        assert {*facts.simple_baselines} <= {*SIMPLE_BASELINES}
        assert {*facts.baseline_metrics} <= {*facts.metrics}


def test_a_classifier_is_compared_with_tfidf_on_the_rows_that_it_was_trained_on(built, tmp_path):
    rows = [
        *({"text": f"{row['text']} item {i}", "label": row["label"]} for i, row in enumerate(colour_rows(90))),
        {"text": "red " * 200, "label": "blue"},  # too long, so not learned by either
    ]
    report, folder = run(
        recipe_for(tmp_path / "r.yaml", built("bert"), rows, data={"on_overlong": "drop", "deduplicate": "none"})
    )
    kept = load_rows(folder / "data" / "rows")
    train = [row for _, row in iterate_rows(kept, "train") if len(row["text"]) < 200]
    test = [row for _, row in iterate_rows(kept, "test")]
    labels = ["blue", "green", "red"]
    fitted = fit_tfidf(
        "single",
        [f"{row['text']}\n" for row in train],
        np.array([labels.index(row["label"]) for row in train]),
        3,
        [f"{row['text']}\n" for row in test],
    )
    right = np.mean([labels[k] == row["label"] for k, row in zip(fitted.scores_AK.argmax(1), test, strict=True)])
    assert report["evaluation"]["simple_baselines"]["tfidf"]["scores"]["accuracy"] == pytest.approx(float(right))
    assert report["evaluation"]["signatures"]["tfidf"] == fitted.note


def test_probabilities_of_the_baseline_are_measured_too(built, tmp_path):
    metrics = ["accuracy", "nll", "brier", "ece"]
    report, _ = run(recipe_for(tmp_path / "r.yaml", built("bert"), colour_rows(), evaluate={"metrics": metrics}))
    scores = report["evaluation"]["simple_baselines"]["tfidf"]["scores"]
    assert scores.keys() == {*metrics}
    assert 0 < scores["nll"] < np.log(3)


def test_pairs_of_texts_are_one_text_for_the_baseline(built, tmp_path):
    rows = [{**row, "pair": row["text"], "text": f"number {i}"} for i, row in enumerate(colour_rows())]
    report, _ = run(recipe_for(tmp_path / "r.yaml", built("bert"), rows))
    assert report["evaluation"]["simple_baselines"]["tfidf"]["scores"]["accuracy"] == 1.0


def test_a_failed_gate_on_the_baseline_ends_the_run_and_a_new_evaluation_reuses_its_answers(built, tmp_path):
    path = recipe_for(
        tmp_path / "r.yaml", built("bert"), colour_rows(), train={"max_steps": 1, "num_train_epochs": None}
    )
    report, folder = run(path)
    changed = load_recipe(
        str(path), ["evaluate.gates=['accuracy.low > tfidf']", "evaluate.metrics=[accuracy, f1_macro]"]
    )
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(GateFailed) as caught:
        run_pipeline(changed, RunRequest(out=folder, offline=True), console)
    (gate,) = caught.value.report["gates"]
    assert gate["wanted"] == "low end of the difference from tfidf > 0"
    assert "reusing its answers from an earlier evaluation" in console.file.getvalue()
    again = json.loads((folder / "report.json").read_text())["evaluation"]["simple_baselines"]["tfidf"]
    before = report["evaluation"]["simple_baselines"]["tfidf"]
    assert (again["note"], again["scores"]["accuracy"]) == (before["note"], before["scores"]["accuracy"])
    assert 'name="tfidf.accuracy"' in (folder / "junit.xml").read_text()


def test_a_release_and_a_comparison_name_the_baseline(finished, tmp_path, console):
    folder, report = finished("classify")
    simple = report["evaluation"]["simple_baselines"]["tfidf"]
    file = make_release(folder, tmp_path / "one.json")
    assert json.loads(file.read_text())["simple_baselines"]["tfidf"]["scores"] == simple["scores"]
    assert (
        open_release(file, "one").evaluation.simple_baselines == load_evaluation(folder / "evaluation").simple_baselines
    )
    shown = invoke("release", "show", str(file)).stdout
    assert "Against simple baselines" in shown
    again = shutil.copytree(folder, tmp_path / "again")
    made = compare_runs([folder, again], tmp_path / "comparison", console)
    assert [run["simple_baselines"]["tfidf"]["scores"] for run in made["runs"]] == [simple["scores"]] * 2
    page = (tmp_path / "comparison" / "compare.md").read_text()
    assert f"| tfidf | – | {score(simple['scores']['accuracy'])} |" in page


def test_rows_that_teach_nothing_give_the_reason_and_no_scores(built, tmp_path):
    rows = [{"text": "?" * (i + 1), "label": "ab"[i % 2]} for i in range(60)]
    data = {"deduplicate": "none", "max_length": 128}
    report, folder = run(recipe_for(tmp_path / "r.yaml", built("bert"), rows, data=data))
    assert report["evaluation"]["simple_baselines"].get("tfidf") is None
    assert report["evaluation"]["signatures"]["tfidf"] == "not measured: the training rows have no words"
    assert "tfidf" not in load_evaluation(folder / "evaluation").simple_baselines


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("One. Two! Three? Four.", "One. Two! Three?"),
        ("Version 1.5 is out. It is fast.\nHeading\nMore.", "Version 1.5 is out. It is fast. Heading"),
        ("一つ。二つ。三つ。四つ。", "一つ。 二つ。 三つ。"),
        ("no full stop", "no full stop"),
        ("", ""),
    ],
)
def test_the_lead_is_the_first_three_sentences(document, expected):
    assert lead(document) == expected
