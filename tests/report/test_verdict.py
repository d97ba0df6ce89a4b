from __future__ import annotations

import math

import pytest

from llmtune.report import verdict

BETTER, WORSE, OPEN, UNKNOWN = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.2), (math.nan, math.nan)
LESS, MORE = (-0.3, -0.1), (0.1, 0.3)


def judge(n=100, **intervals):
    changes = {metric: {"value": 0.0, "interval": list(ends), "p": 0.5, "n": n} for metric, ends in intervals.items()}
    return verdict({"evaluation": {"difference": changes}})


@pytest.mark.parametrize(
    ("intervals", "word"),
    [
        ({"exact_match": BETTER, "loss": LESS, "choice_accuracy": BETTER}, "helped"),
        ({"loss": LESS}, "helped"),
        ({"loss": MORE}, "harmed"),
        ({"exact_match": WORSE, "loss": (-0.1, 0.1)}, "harmed"),
        ({"exact_match": BETTER, "loss": MORE}, "mixed"),
        ({"exact_match": BETTER, "choice_accuracy": WORSE}, "mixed"),
        ({"exact_match": OPEN, "loss": OPEN}, "can't tell"),
        ({"exact_match": UNKNOWN}, "can't tell"),
        ({"exact_match": (None, None)}, "can't tell"),
    ],
)
def test_the_verdict_follows_the_intervals(intervals, word):
    assert judge(**intervals)["word"] == word


def test_a_gain_that_choices_do_not_share_may_be_format_alone():
    found = judge(exact_match=BETTER, loss=LESS, choice_accuracy=OPEN)
    assert found["word"] == "can't tell"
    assert "format" in found["reason"]


def test_too_few_rows_tell_nothing():
    found = judge(n=9, exact_match=BETTER)
    assert found["word"] == "can't tell"
    assert "9 held-out rows" in found["reason"]


def test_one_finding_in_three_units_is_named_once():
    assert judge(loss=LESS, bits_per_byte=LESS, perplexity=LESS)["reason"].startswith("Better in loss, and")


@pytest.mark.parametrize("report", [{}, {"evaluation": None}, {"evaluation": {"difference": {}}}])
def test_without_an_evaluation_one_cannot_tell(report):
    assert verdict(report)["word"] == "can't tell"
