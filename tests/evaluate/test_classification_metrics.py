import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn

from llmtune.evaluate.classification_metrics import (
    CLASS_METRICS,
    ENTITY_METRICS,
    class_table,
    confusion,
    entity_table,
    majority_scores,
    measure_classes,
    measure_entities,
)

LABELS = ("bad", "fair", "good")
F1 = {"f1_macro": "macro", "f1_micro": "micro", "f1_weighted": "weighted"}
ROWS = 40


def softmax(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def draw(kind, rows=ROWS, seed=0, labels=LABELS):
    """Scores that correlate with the references; numbers are rounded to create ties."""
    generator = np.random.default_rng(seed)
    if kind == "single":
        classes = generator.choice(len(labels), size=rows)
        scores = softmax(np.round(generator.normal(size=(rows, len(labels))) + 1.2 * np.eye(len(labels))[classes], 1))
        return scores, [labels[k] for k in classes]
    if kind == "multi":
        true = generator.random((rows, len(labels))) < [0.6, 0.3, 0.1]
        scores = np.round(1 / (1 + np.exp(-generator.normal(size=true.shape) - 2 * (true - 0.5))), 2)
        return scores, [[labels[k] for k in np.flatnonzero(row)] for row in true]
    wanted = generator.normal(size=rows).round(1)
    return (wanted + generator.normal(size=rows)).round(1)[:, None], wanted.tolist()


def indexes(references, labels=LABELS):
    return np.array([labels.index(reference) for reference in references])


def indicators(references, labels=LABELS):
    return np.array([[label in reference for label in labels] for reference in references]).reshape(-1, len(labels))


def by_the_library(metric, kind, scores, references, labels=LABELS):
    if kind == "regression":
        found, wanted = scores[:, 0], np.array(references)
        return {
            "mse": lambda: sklearn.mean_squared_error(wanted, found),
            "mae": lambda: sklearn.mean_absolute_error(wanted, found),
            "pearson": lambda: pearsonr(found, wanted).statistic,
            "spearman": lambda: spearmanr(found, wanted).statistic,
        }[metric]()
    single = kind == "single"
    wanted = indexes(references, labels) if single else indicators(references, labels)
    found = scores.argmax(1) if single else scores > 0.5
    if metric in F1:
        occurring = np.union1d(wanted, found) if single else np.flatnonzero((wanted | found).any(0))
        if not len(occurring):
            return 0.0
        return sklearn.f1_score(wanted, found, labels=occurring, average=F1[metric], zero_division=0)
    if metric == "auroc" and single and len(labels) == 2:
        return sklearn.roc_auc_score(wanted, scores[:, 1])
    if metric == "auroc":
        columns = wanted[:, None] == np.arange(len(labels)) if single else wanted
        areas = [
            sklearn.roc_auc_score(column, score)
            for column, score in zip(columns.T, scores.T, strict=True)
            if len(set(column)) == 2
        ]
        return float(np.mean(areas)) if areas else math.nan
    return {"accuracy": sklearn.accuracy_score, "matthews": sklearn.matthews_corrcoef}[metric](wanted, found)


CASES = [(kind, metric) for kind, metrics in CLASS_METRICS.items() for metric in metrics]


@pytest.mark.promise("metric", "referee", equal="scikit-learn or SciPy, within 1e-12")
@pytest.mark.parametrize(("kind", "metric"), CASES)
@pytest.mark.parametrize("seed", range(6))
def test_scores_of_a_few_rows_equal_the_librarys_even_if_classes_are_missing(kind, metric, seed):
    scores, references = draw(kind, rows=4, seed=seed)
    wanted = by_the_library(metric, kind, scores, references)
    found = measure_classes(metric, kind, scores, references, LABELS).value
    assert found == pytest.approx(wanted, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("metric", CLASS_METRICS["single"])
def test_two_classes_are_scored_as_in_the_library(metric):
    labels = ("no", "yes")
    scores, references = draw("single", labels=labels)
    wanted = by_the_library(metric, "single", scores, references, labels)
    assert measure_classes(metric, "single", scores, references, labels).value == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12))
def test_the_area_with_ties_equals_that_of_scikit_learn(rows):
    score, true = np.array([score / 3 for score, _ in rows]), [true for _, true in rows]
    references = [("no", "yes")[value] for value in true]
    found = measure_classes("auroc", "single", np.stack([1 - score, score], 1), references, ("no", "yes")).value
    assert found == pytest.approx(sklearn.roc_auc_score(true, score) if len(set(true)) == 2 else math.nan, nan_ok=True)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_constant_numbers_correlate_with_nothing(metric):
    wanted = [0.1, 0.2, 0.9, 0.4]
    same = np.full((4, 1), 0.1) * 3
    assert measure_classes(metric, "regression", same, wanted, ()).value == 0
    assert math.isnan(measure_classes(metric, "regression", np.array([wanted]).T, [0.3] * 4, ()).value)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_the_class_table_equals_that_of_scikit_learn(kind):
    scores, references = draw(kind, rows=6, seed=3)
    wanted = indexes(references) if kind == "single" else indicators(references)
    found = scores.argmax(1) if kind == "single" else scores > 0.5
    columns = sklearn.precision_recall_fscore_support(wanted, found, labels=range(3), zero_division=0)
    table = class_table(kind, scores, references, LABELS)
    assert [row["label"] for row in table] == list(LABELS)
    for row, values in zip(table, zip(*columns, strict=True), strict=True):
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(list(values), abs=1e-12)


def test_the_confusion_matrix_equals_that_of_scikit_learn():
    scores, references = draw("single", seed=2)
    wanted = sklearn.confusion_matrix(indexes(references), scores.argmax(1), labels=range(3))
    found = confusion(scores, references, LABELS)
    assert found == wanted.tolist()
    assert found != wanted.T.tolist()


def test_the_majority_baseline_predicts_the_most_frequent_training_label():
    scores = majority_scores(["bad", "good", "good", "fair"], "single", LABELS, 3)
    assert scores.tolist() == [[0.25, 0.25, 0.5]] * 3
    assert measure_classes("accuracy", "single", scores, ["good", "bad", "good"], LABELS).value == 2 / 3
    assert measure_classes("auroc", "single", scores, ["good", "bad", "good"], LABELS).value == 0.5


def test_the_majority_baseline_for_numbers_predicts_their_mean():
    scores = majority_scores([1.0, 2.0, 6.0], "regression", (), 4)
    assert scores.tolist() == [[3.0]] * 4
    assert measure_classes("mse", "regression", scores, [3.0, 4.0, 3.0, 3.0], ()).value == 0.25
    assert measure_classes("spearman", "regression", scores, [3.0, 4.0, 2.0, 3.0], ()).value == 0


REFERENCE = [
    ["B-PER", "I-PER", "O", "B-LOC"],
    ["O", "O", "B-ORG", "I-ORG", "I-ORG", "B-ORG"],
    ["O", "O"],
    ["B-LOC", "B-LOC", "O", "B-MISC"],
]
PREDICTED = [
    ["B-PER", "I-PER", "O", "B-ORG"],
    ["O", "I-ORG", "I-ORG", "I-ORG", "O", "B-ORG"],
    ["O", "B-PER"],
    ["B-LOC", "I-LOC", "O", "I-MISC"],
]
SEQEVAL = {
    "precision": seqeval.precision_score,
    "recall": seqeval.recall_score,
    "f1": seqeval.f1_score,
    "accuracy": seqeval.accuracy_score,
}
TAG = st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B", "B-x-y", "I-x-y"])
TAGGED_ROWS = st.lists(st.lists(st.tuples(TAG, TAG), min_size=1, max_size=8), min_size=1, max_size=5)


def entity_score(metric, predicted, reference):
    options = {} if metric == "accuracy" else {"zero_division": 0}
    return SEQEVAL[metric](reference, predicted, **options)


@pytest.mark.promise("metric", "referee", equal="seqeval, within 1e-12", place="precision")
@pytest.mark.promise("metric", "referee", equal="seqeval, within 1e-12", place="recall")
@pytest.mark.promise("metric", "referee", equal="seqeval, within 1e-12", place="f1")
@settings(max_examples=200, deadline=None)
@given(TAGGED_ROWS)
def test_entity_scores_equal_those_of_seqeval_for_any_tags(rows):
    predicted, reference = [[tag for tag, _ in row] for row in rows], [[tag for _, tag in row] for row in rows]
    for metric in ENTITY_METRICS:
        wanted = entity_score(metric, predicted, reference)
        assert measure_entities(metric, predicted, reference).value == pytest.approx(wanted, abs=1e-12)


def test_the_type_table_equals_that_of_seqeval():
    report = seqeval.classification_report(REFERENCE, PREDICTED, output_dict=True, zero_division=0)
    found = entity_table(PREDICTED, REFERENCE)
    assert [row["label"] for row in found] == ["LOC", "MISC", "ORG", "PER"]
    for row in found:
        wanted = report[row["label"]]
        for ours, theirs in {
            "precision": "precision",
            "recall": "recall",
            "f1": "f1-score",
            "support": "support",
        }.items():
            assert row[ours] == pytest.approx(wanted[theirs], abs=1e-12)
