"""The power that rows are reported to have, checked in simulations with known truth."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
from scipy.stats import nct, t

from llmtune.evaluate.gates import decide, list_power
from llmtune.evaluate.metric import ratio
from llmtune.evaluate.paired_statistics import (
    difference,
    row_deviation,
    rows_needed,
    smallest_difference,
)
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.records import Difference
from llmtune.store.score_records import Champion, Evaluation

GATE = parse_gate("accuracy.low > base")

ROWS, TRIALS, MARGIN = 300, 1000, 0.02


def right_or_wrong(generator, rows, true):
    """Two fifths of the rows flip."""
    place = generator.random(rows)
    gained, lost = 0.2 + true / 2, 0.2 - true / 2
    champion, tuned = place < 0.3 + lost, (place < 0.3) | ((place >= 0.3 + lost) & (place < 0.3 + lost + gained))
    return np.stack([champion, np.ones(rows)], 1).astype(float), np.stack([tuned, np.ones(rows)], 1).astype(float)


def losses(generator, rows, true):
    shared = generator.gamma(2, 1, rows)
    noise = generator.gamma(1, 0.5, (2, rows))
    ones = np.ones(rows)
    return np.stack([shared + noise[0], ones], 1), np.stack([shared + noise[1] + true, ones], 1)


def measure(draw, generator, rows, true):
    champion, tuned = draw(generator, rows, true)
    right_wrong = draw is right_or_wrong
    return difference(champion, tuned, ratio, right_wrong=right_wrong, seed=0, resamples=800)


def shares(draw, true, limit, trials=TRIALS):
    """How often `X.low > champion + limit` passes, fails and is inconclusive if the true difference is `true`."""
    generator, seen = np.random.default_rng(17), Counter()
    for _ in range(trials):
        change = measure(draw, generator, ROWS, true)
        seen[decide(GATE, change.low, change, limit)] += 1
    return seen[True] / trials, seen[False] / trials, seen[None] / trials


def computed(deviation, true, limit):
    """The shares of a paired t test whose interval is wider than the margin: it cannot be worse and within it."""
    free, error = ROWS - 1, deviation / math.sqrt(ROWS)
    passed = nct.sf(t.ppf(0.975, free), free, (true - limit) / error)
    failed = nct.cdf(t.ppf(0.025, free), free, true / error)
    return passed, failed, 1 - passed - failed


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("draw", [right_or_wrong, losses])
def test_gates_pass_fail_and_are_inconclusive_as_often_as_an_earlier_run_promised(draw):
    generator = np.random.default_rng(1)  # more rows would have less of a floor
    deviation = float(np.mean([row_deviation(measure(draw, generator, ROWS, 0.0)) for _ in range(100)]))
    smallest = smallest_difference(deviation, ROWS)
    near = partial(pytest.approx, abs=0.05)
    unchanged = shares(draw, 0.0, -smallest)
    assert unchanged[0] == near(0.8)
    assert unchanged == near(computed(deviation, 0.0, -smallest))
    assert unchanged[1] <= 0.05
    lost = shares(draw, -MARGIN - smallest, -MARGIN)
    assert lost[1] > 0.8, "shown to be worse, and not shown to be within the margin"
    assert lost == near(computed(deviation, -MARGIN - smallest, -MARGIN))
    at_the_margin = shares(draw, -MARGIN, -MARGIN, 500)
    assert at_the_margin[0] <= 0.05
    no_change = shares(draw, 0.0, 0.0, 500)
    assert no_change[1] <= 0.05
    assert no_change == near(computed(deviation, 0.0, 0.0))


@pytest.mark.usefixtures("drawn_once")
def test_a_gate_with_a_margin_fails_a_worse_model_and_seldom_an_equal_one():
    """Two fifths of 300 rows flip; the margin is 0.1, and one row in ten is about 1.6 standard errors."""
    equal, within, at_the_margin, beyond = (
        shares(right_or_wrong, true, -0.1, 500) for true in (0.0, -0.05, -0.1, -0.2)
    )
    assert equal[1] <= 0.04
    assert equal[0] > 0.7
    assert at_the_margin[0] <= 0.04
    assert at_the_margin[1] > 0.7
    assert beyond[1] > 0.99
    assert within[1] < at_the_margin[1]


@pytest.mark.parametrize("deviation", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("distance", [0.001, 0.02, 0.7, 5.0])
def test_the_rows_needed_are_the_fewest_that_show_the_difference(deviation, distance):
    rows = rows_needed(deviation, distance)
    assert smallest_difference(deviation, rows) <= distance
    assert rows == 2 or smallest_difference(deviation, rows - 1) > distance


def test_no_number_of_rows_shows_a_difference_equal_to_the_limit():
    assert rows_needed(0.5, 0.0) is None
    assert rows_needed(math.nan, 0.1) is None


CHANGE = Difference(0.01, -0.02, 0.04, 0.5, 100)
EVALUATION = Evaluation(
    {"accuracy": 0.4, "loss": 2.0},
    {"accuracy": 0.5, "loss": 2.0},
    {"accuracy": Difference(0.1, 0.05, 0.15, 0.01, 100), "loss": Difference(0.0, 0.0, 0.0, 1.0, 100)},
    (),
    100,
    champion=Champion("runs/best", {"accuracy": 0.49}, {"accuracy": CHANGE}, {}),
)


def test_gates_come_first_and_unknown_power_is_omitted():
    gates = ("accuracy.low > champion - 0.02", "accuracy.low > champion", "accuracy >= 0.3", "loss.high < base")
    margin, seen, base = list_power(EvaluateSection(gates=gates), EVALUATION)
    assert [margin.gate, seen.gate, base.gate] == [gates[0], gates[1], ""]
    assert (margin.assumed, seen.assumed) == (0, 0.01)
    assert margin.rows_needed == rows_needed(row_deviation(CHANGE), 0.02)
    assert seen.rows_needed == rows_needed(row_deviation(CHANGE), 0.01)
    assert (base.metric, base.against, base.rows_needed) == ("accuracy", "base", None)
    assert margin.smallest == pytest.approx(0.0428, abs=1e-4)


def test_other_numbers_of_rows_show_other_differences():
    (one, *_), (four, *_) = (list_power(EvaluateSection(), EVALUATION, rows) for rows in (100, 400))
    assert (one.rows, four.rows) == (100, 400)
    assert four.smallest == pytest.approx(one.smallest / 2, rel=0.01)
