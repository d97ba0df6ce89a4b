import math

import numpy as np
import pytest

from llmtune.evaluate.metric import Measure, paired_difference
from llmtune.evaluate.text_metrics import TEXT_MEASURES, measure_tokens


def test_exact_match_strips_outer_white_space_and_nothing_else():
    found = TEXT_MEASURES["exact_match"]([" yes\n", "Yes", "yes.", "a  b"], ["yes", "yes", "yes", "a b"])
    assert found.value == 0.25


@pytest.mark.promise("metric", "referee", equal="sums by hand", place="loss")
@pytest.mark.promise("metric", "referee", equal="sums by hand", place="perplexity")
@pytest.mark.promise("metric", "referee", equal="sums by hand", place="bits_per_byte")
@pytest.mark.promise("metric", "referee", equal="sums by hand", place="accuracy")
def test_token_metrics_are_weighted_by_their_denominators():
    nats, correct, tokens, size = map(np.array, ([2.0, 9.0], [1.0, 2.0], [1.0, 3.0], [4.0, 10.0]))
    value = {
        metric: measure_tokens(metric, nats, correct, tokens, size).value
        for metric in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }
    assert value["loss"] == pytest.approx(11 / 4)
    assert value["perplexity"] == pytest.approx(math.exp(11 / 4))
    assert value["bits_per_byte"] == pytest.approx(11 / math.log(2) / 14)
    assert value["accuracy"] == pytest.approx(3 / 4)


def largest(numbers):
    """The largest number among the drawn rows, which no sum can express."""
    rows_N1 = np.asarray(numbers, dtype=float)[:, None]
    ranking = lambda rows_N1: lambda counts_RN: np.where(counts_RN > 0, rows_N1[:, 0], 0).max(1)  # noqa: E731
    return Measure("largest", rows_N1, None, ranking=ranking, bounds=lambda rows: (np.zeros((1, 1)), rows.max(0)[None]))


def test_a_ranking_measure_has_the_value_of_every_row_drawn_once():
    assert largest([1, 5, 2]).value == 5
    assert largest([1, 5, 2]).resampled(np.array([[2.0, 0, 1], [0, 3, 0]])).tolist() == [2, 5]
    assert math.isnan(largest([]).value)


def test_ranking_measures_are_compared_over_the_same_draws():
    found = paired_difference(largest(np.arange(50)), largest(np.arange(50) + 3), seed=0)
    assert (found.value, found.high, found.n) == (3, 3, 50)
    assert found.low == 0  # the base has the largest number too, on a pseudo-row


def test_ranking_measures_have_no_interval_with_one_row_and_no_value_without_rows():
    one, none = (
        paired_difference(largest([1]), largest([2]), seed=0),
        paired_difference(largest([]), largest([]), seed=0),
    )
    assert (one.value, one.p, one.n) == (1, 1, 1)
    assert math.isnan(one.low)
    assert math.isnan(none.value)
