import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import metrics as seqeval

from llmtune.evaluate.classification_metrics import ENTITY_METRICS, entity_table, measure_entities

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
ROWS = st.lists(st.lists(st.tuples(TAG, TAG), min_size=1, max_size=8), min_size=1, max_size=5)


def score(metric, predicted, reference):
    options = {} if metric == "accuracy" else {"zero_division": 0}
    return SEQEVAL[metric](reference, predicted, **options)


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_the_score_of_entities_is_that_of_seqeval_for_any_tags(rows):
    predicted, reference = [[tag for tag, _ in row] for row in rows], [[tag for _, tag in row] for row in rows]
    for metric in ENTITY_METRICS:
        wanted = score(metric, predicted, reference)
        assert measure_entities(metric, predicted, reference).value == pytest.approx(wanted, abs=1e-12)


def test_the_table_of_types_is_that_of_seqeval():
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
