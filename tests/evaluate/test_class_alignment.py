"""Scores of runs with other classes: padded, reordered, renamed and merged before they are compared."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score
from support.classifying import CLASS_METRICS as METRICS
from support.classifying import scored

from llmtune.evaluate.class_alignment import align_classes, map_classes, pair_metrics, rename_prediction
from llmtune.recipe.schema import Recipe

REFERENCES = ["a", "b", "c", "a", "b", "c", "a", "b"]


def test_runs_with_classes_in_another_order_are_compared_column_by_column():
    own = scored(["a", "b", "c"], ["a", "b", "c", "a", "b", "b", "a", "b"], REFERENCES)
    other = scored(["c", "a", "b"], ["a", "b", "c", "a", "b", "a", "b", "b"], REFERENCES)
    other, own, left_out = align_classes(other, own, {})
    assert left_out == {}
    for metric in METRICS:
        assert other.measures.tuned[metric].value == pytest.approx(other.evaluation.tuned[metric])
        assert own.measures.tuned[metric].value == pytest.approx(own.evaluation.tuned[metric])
    true_columns = [run.measures.tuned["f1_macro"].sums_NK[:, 6:] for run in (other, own)]
    assert (true_columns[0] == true_columns[1]).all()


def test_a_class_that_one_run_does_not_have_counts_as_never_predicted_there():
    own_answers, other_answers = ["a", "b", "c", "a", "b", "c", "a", "b"], ["a", "b", "x", "a", "b", "b", "a", "b"]
    labels = ["a", "b", "c", "x"]
    own = scored(["a", "b", "c"], own_answers, REFERENCES)
    other = scored(["a", "b", "x"], other_answers, ["a", "b", "x", "a", "b", "b", "a", "b"])
    other = replace(
        other,
        measures=replace(other.measures, tuned=scored(labels, other_answers, REFERENCES).measures.tuned),
        evaluation=replace(other.evaluation, details={"tuned": {"classes": [{"label": label} for label in labels]}}),
    )
    difference, left_out = pair_metrics(other, own)
    assert left_out == {}
    before = f1_score(REFERENCES, other_answers, average="macro")
    assert difference["f1_macro"].value == pytest.approx(1 - before)
    assert difference["accuracy"].value == pytest.approx(2 / 8)


def test_a_renamed_class_is_the_same_class():
    old = ["k" if label == "c" else label for label in REFERENCES]
    own = scored(["a", "b", "c"], REFERENCES, REFERENCES, rename={"k": "c"})
    difference, left_out = pair_metrics(scored(["a", "b", "k"], old, old), own)
    assert left_out == {}
    assert {metric: change.value for metric, change in difference.items()} == dict.fromkeys(METRICS, 0.0)


def test_two_classes_with_one_new_name_are_one_class_and_confusing_them_is_no_error():
    labels, references = ["a", "b", "old"], ["a", "b", "old", "a", "b", "old", "a", "b"]
    answers = ["a", "old", "b", "a", "b", "old", "b", "b"]
    rename = {"old": "b"}
    own = scored(["a", "b"], ["a", "b"] * 4, ["b" if one == "old" else one for one in references], rename=rename)
    other, own, left_out = align_classes(scored(labels, answers, references, "the champion"), own, rename)
    assert left_out == {}
    merged = [["b" if one == "old" else one for one in some] for some in (references, answers)]
    found = {metric: one.value for metric, one in other.measures.tuned.items()}
    assert found["accuracy"] == found["f1_micro"] == pytest.approx(7 / 8)
    assert found["f1_macro"] == pytest.approx(f1_score(*merged, average="macro"))
    assert other.measures.tuned["auroc"].signature == own.measures.tuned["auroc"].signature
    assert found["f1_weighted"] == pytest.approx(f1_score(*merged, average="weighted"))
    few = scored(labels, answers, references, "the champion", metrics=("accuracy",))
    assert align_classes(few, own, rename)[2]["accuracy"].startswith(
        "'b' was 2 classes in the champion, and it has no f1"
    )


def test_an_area_of_two_classes_becomes_a_mean_over_classes_next_to_a_third():
    references = ["a", "b", "a", "b", "a", "b"]
    other = scored(["a", "b"], ["a", "b", "b", "b", "a", "a"], references)
    own = scored(["a", "b", "c"], ["a", "b", "a", "b", "c", "b"], references)
    other, own, _ = align_classes(other, own, {})
    assert other.measures.tuned["auroc"].signature == own.measures.tuned["auroc"].signature
    second = np.array([0.1, 0.9, 0.9, 0.9, 0.1, 0.1])
    area = roc_auc_score([one == "b" for one in references], second)
    assert other.measures.tuned["auroc"].value == pytest.approx(area)


@pytest.mark.parametrize(
    ("prediction", "renamed"),
    [
        ({"label": "k", "scores": [0.2, 0.8]}, {"label": "c", "scores": [0.0, 0.2, 0.8]}),
        ({"label": ["a", "k"], "scores": [0.7, 0.8]}, {"label": ["a", "c"], "scores": [0.0, 0.7, 0.8]}),
        (["B-k", "I-k", "O"], ["B-c", "I-c", "O"]),
        ("a text", "a text"),
    ],
)
def test_predictions_get_the_names_and_places_of_both_runs(prediction, renamed):
    _, classes = map_classes(["b", "a", "c"], ["a", "k"], {"k": "c"})
    assert rename_prediction(prediction, classes) == renamed
    assert classes.outputs == ("a", "c")


def test_runs_of_unknown_classes_are_left_as_they_are():
    own = scored(["a", "b", "c"], REFERENCES, REFERENCES)
    content = {"task": "classify", "model": {"name": "x/y"}, "data": {"train": "x.jsonl"}}
    other = replace(own, recipe=Recipe.model_validate(content), evaluation=replace(own.evaluation, details={}))
    assert align_classes(other, own, {}) == (other, own, {})
