"""What the page shows first is what the verdict stands on."""

from __future__ import annotations

import pytest

from llmtune.records import Difference, Evaluation
from llmtune.report.report_page import headline
from llmtune.report.verdict import verdict

BETTER, WORSE, OPEN = (0.1, 0.3), (-0.3, -0.1), (-0.07, 0.17)
LESS, MORE = (-0.3, -0.1), (0.1, 0.3)


def first_shown(rows=100, **intervals):
    changes = {
        metric: Difference(0.05, *ends, 0.5 if ends == OPEN else 0.001, rows) for metric, ends in intervals.items()
    }
    evaluation = Evaluation({}, {}, changes, (), (), rows)
    return headline(evaluation, verdict(evaluation).word)


@pytest.mark.parametrize(
    ("intervals", "metric", "tone"),
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
def test_the_headline_bears_the_verdict_out(intervals, metric, tone):
    row = first_shown(**intervals)
    assert (row.name, row.tone) == (metric, tone)


def test_a_gain_on_too_few_rows_is_not_what_the_verdict_stands_on():
    changes = {"exact_match": Difference(0.2, *BETTER, 0.1, 4), "loss": Difference(-0.2, *LESS, 0.01, 50)}
    assert headline(Evaluation({}, {}, changes, (), (), 50), "helped").name == "loss"


def test_without_differences_there_is_no_headline():
    assert first_shown() is None
