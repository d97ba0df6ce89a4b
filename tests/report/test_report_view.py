"""What the page shows first is what the verdict stands on."""

from __future__ import annotations

import pytest

from llmtune.report import verdict
from llmtune.report.report_view import make_view

BETTER, WORSE, OPEN = (0.1, 0.3), (-0.3, -0.1), (-0.07, 0.17)
LESS, MORE = (-0.3, -0.1), (0.1, 0.3)


def view_of(n=100, **intervals):
    changes = {
        metric: {"value": 0.05, "interval": list(ends), "p": 0.5 if ends == OPEN else 0.001, "n": n}
        for metric, ends in intervals.items()
    }
    found = {"evaluation": {"base": {}, "tuned": {}, "difference": changes, "rows": n}}
    return make_view({**found, "verdict": verdict(found)})


@pytest.mark.parametrize(
    ("intervals", "metric", "kind"),
    [
        ({"loss": LESS, "exact_match": OPEN}, "loss", "better"),
        ({"loss": LESS, "exact_match": BETTER}, "exact match", "better"),
        ({"exact_match": BETTER, "choice_accuracy": BETTER}, "choice accuracy", "better"),
        ({"loss": MORE, "exact_match": OPEN, "rougeL": WORSE}, "rougeL", "worse"),
        ({"loss": MORE, "exact_match": OPEN}, "loss", "worse"),
        ({"loss": LESS, "exact_match": OPEN, "rougeL": WORSE}, "rougeL", "worse"),
        ({"loss": LESS, "exact_match": BETTER, "choice_accuracy": OPEN}, "choice accuracy", "unsure"),
        ({"loss": OPEN, "exact_match": OPEN}, "exact match", "unsure"),
        ({"perplexity": LESS, "accuracy": OPEN}, "perplexity", "better"),
        ({"loss": LESS, "cer": LESS, "wer": LESS}, "wer", "better"),
        ({"accuracy": BETTER, "f1": BETTER}, "f1", "better"),
        ({"kl": MORE, "loss": LESS}, "loss", "better"),
        ({"length_ratio": BETTER, "rouge1": OPEN}, "rouge1", "unsure"),
    ],
)
def test_the_headline_bears_the_verdict_out(intervals, metric, kind):
    found = view_of(**intervals)["headline"]
    assert (found["metric"], found["kind"]) == (metric, kind)


def test_a_gain_on_too_few_rows_is_not_what_the_verdict_stands_on():
    found = {"exact_match": {"value": 0.2, "interval": BETTER, "p": 0.1, "n": 4}}
    found["loss"] = {"value": -0.2, "interval": LESS, "p": 0.01, "n": 50}
    report = {"evaluation": {"base": {}, "tuned": {}, "difference": found, "rows": 50}}
    view = make_view({**report, "verdict": verdict(report)})
    assert view["verdict"]["word"] == "helped"
    assert view["headline"]["metric"] == "loss"


def test_without_differences_there_is_no_headline():
    assert make_view({"evaluation": {"difference": {}}, "verdict": verdict({})})["headline"] is None
