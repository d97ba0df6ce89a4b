"""Intervals of bounded metrics: equal answers on a few rows prove nothing, and a gate with a margin keeps its error."""

import numpy as np
import pytest
from scipy.stats import binom

from llmtune.evaluate.classification_metrics import measure_classes, measure_entities, measure_numbers
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.metric import Measure, chrf_bounds, error_bounds, measure_shares, paired_difference, ratio
from llmtune.evaluate.paired_statistics import difference, share_bounds
from llmtune.evaluate.text_metrics import (
    TEXT_MEASURES,
    chrf_formula,
    error_rate,
    measure_cer,
    measure_squad,
    measure_tokens,
    measure_wer,
)
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.store.score_records import Evaluation

TEXTS = ["the cat sat on the mat today", "a dog ran over the old bridge"]
LABELS = ("red", "green", "blue")


def texts(metric):
    return lambda rows: TEXT_MEASURES[metric]((TEXTS * rows)[:rows], (TEXTS * rows)[:rows])


def classes(metric, labels=LABELS):
    def build(rows):
        right = [labels[i % len(labels)] for i in range(rows)]
        scores = np.array([[0.6 if label == one else 0.2 for label in labels] for one in right])
        return measure_classes(metric, "single", scores, right, labels)

    return build


BOUNDED = {
    **{metric: texts(metric) for metric in TEXT_MEASURES if metric != "length_ratio"},
    "wer": lambda rows: measure_wer((TEXTS * rows)[:rows], (TEXTS * rows)[:rows]),
    "cer": lambda rows: measure_cer((TEXTS * rows)[:rows], (TEXTS * rows)[:rows]),
    "f1": lambda rows: measure_squad("f1", (TEXTS * rows)[:rows], [[one] for one in (TEXTS * rows)[:rows]]),
    "accuracy": lambda rows: measure_tokens(
        "accuracy", np.zeros(rows), np.full(rows, 4.0), np.full(rows, 5.0), np.ones(rows)
    ),
    "f1_macro": classes("f1_macro"),
    "f1_micro": classes("f1_micro"),
    "f1_weighted": classes("f1_weighted"),
    "matthews": classes("matthews"),
    "auroc": classes("auroc", LABELS[:2]),
    "entities": lambda rows: measure_entities("f1", [["B-X", "O"]] * rows, [["B-X", "O"]] * rows),
    "pearson": lambda rows: measure_classes(
        "pearson", "regression", np.arange(rows)[:, None] + 0.5, [float(one) for one in range(rows)], ()
    ),
}
LOWER_IS_BETTER = ("ter", "wer", "cer")
SCALE = {"chrf": 100, "bleu": 100, "ter": 100}


@pytest.mark.parametrize("metric", BOUNDED)
@pytest.mark.parametrize("rows", [2, 8, 40])
def test_equal_answers_on_a_few_rows_pass_no_gate_with_a_margin(metric, rows):
    one = BOUNDED[metric](rows)
    change = paired_difference(one, one, seed=0)
    part, sign = ("high", "+") if metric in LOWER_IS_BETTER else ("low", "-")
    gate = f"{one.metric}.{part} {'<' if sign == '+' else '>'} base {sign} {0.01 * SCALE.get(metric, 1)}"
    scores = {one.metric: one.value}
    evaluation = Evaluation(scores, scores, {one.metric: change}, (), rows)
    (found,) = check_gates(EvaluateSection(gates=(gate,), when_unsure="report"), evaluation)
    assert found.passed is None, (change, found)


@pytest.mark.parametrize("metric", BOUNDED)
def test_many_equal_answers_pass_a_gate_with_a_margin(metric):
    one = BOUNDED[metric](600)
    change = paired_difference(one, one, seed=0)
    assert change.value == 0
    assert max(-change.low, change.high) < (0.08 if metric == "pearson" else 0.03) * SCALE.get(metric, 1)


@pytest.mark.parametrize("metric", BOUNDED)
def test_the_bounds_are_the_metrics_worst_and_best_possible_rows(metric):
    one = BOUNDED[metric](12)
    assert one.bounds is not None
    worst, best = one.bounds(one.sums_NK)
    scores = [
        Measure(one.metric, np.concatenate([one.sums_NK, end]), one.formula, ranking=one.ranking).value
        for end in (worst, best)
    ]
    low, high = sorted(scores)
    assert low < one.value + 1e-9
    assert high > one.value - 1e-9
    assert high - low > 0.01


def test_the_worst_row_of_an_error_rate_is_the_worst_one_observed():
    """It has no upper bound: an answer may never end."""
    assert [part.tolist() for part in error_bounds(np.array([[0.0, 6.0], [40.0, 4.0]]))] == [[[40, 5.2]], [[0, 5.2]]]
    assert [part.tolist() for part in error_bounds(np.array([[0.0, 6.0], [1.0, 4.0]]))] == [[[5.2, 5.2]], [[0, 5.2]]]


def test_an_interval_is_no_wider_than_the_range():
    found = paired_difference(*(measure_shares("f1", [0.7, 0.7], ""),) * 2, seed=0)
    assert -1 <= found.low < -0.5
    assert 0.5 < found.high <= 1


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_baseline_with_constant_predictions_has_no_correlation_in_its_pseudo_rows(metric):
    """With 35 rows and a correlation of 0.9, the interval was -0.33 to +1.57."""
    rng = np.random.default_rng(0)
    right = rng.normal(3, 1, 35)
    mean, tuned = (measure_numbers(metric, one, right) for one in (np.full(35, 3.0), right + rng.normal(0, 0.45, 35)))
    found = paired_difference(mean, tuned, seed=0)
    assert found.value > 0.7
    assert 0.1 < found.low < found.value < found.high <= 1


def test_with_many_rows_the_bounds_hardly_widen_the_interval():
    generator, widths = np.random.default_rng(4), {}
    for rows in (50, 200, 1000):
        base, change = generator.random(rows), generator.normal(0, 0.25, rows) * (generator.random(rows) > 0.3)
        models = [measure_shares("f1", np.clip(one, 0, 1).tolist(), "") for one in (base, base + change)]
        found = paired_difference(*models, seed=0)
        plain = difference(models[0].sums_NK, models[1].sums_NK, ratio, right_wrong=False, seed=0)
        widths[rows] = (found.high - found.low) / (plain.high - plain.low)
    assert widths[50] < 2
    assert widths[200] < 1.4
    assert widths[1000] < 1.15


# A model that is worse by exactly the margin

SHAPES = {
    "either way": (lambda generator, rows: generator.uniform(-0.8, 0.4, rows), -0.2),
    "small": (lambda generator, rows: generator.uniform(-0.3, 0.2, rows), -0.05),
    "skewed": (lambda generator, rows: -generator.beta(0.5, 3, rows), -0.5 / 3.5),
    "few large": (lambda generator, rows: np.where(generator.random(rows) < 0.15, -0.9, 0.05), -0.0925),
    "rare total": (lambda generator, rows: np.where(generator.random(rows) < 0.05, -1, 0.03), -0.0215),
}
"""Size of a row's change if it changes at all, and the mean of that."""
RESAMPLES = 600


def scores_of_rows(generator, shape, rows, ties):
    """Scores of two models in [0, 1], a share of them equal, and their true difference."""
    draw, mean = SHAPES[shape]
    change = draw(generator, rows) * (generator.random(rows) >= ties)
    lowest, highest = np.maximum(0, -change), np.minimum(1, 1 - change)
    base = lowest + (highest - lowest) * generator.random(rows)
    return base, base + change, mean * (1 - ties)


def passes(metric, shape, rows, ties, trials):
    """The share of runs that pass a model that is worse by exactly the margin."""
    generator, passed = np.random.default_rng(3), 0
    for _ in range(trials):
        *models, margin = scores_of_rows(generator, shape, rows, ties)
        sizes = np.ones(rows) if metric == "mean" else generator.integers(3, 30, rows).astype(float)
        if metric == "chrf":
            counts = 6 * sizes[:, None] - np.arange(6)
            sums = [np.stack([counts, counts, counts * one[:, None]], 2).reshape(rows, 18) for one in models]
            change = difference(*sums, chrf_formula, right_wrong=False, seed=0, resamples=RESAMPLES, bounds=chrf_bounds)
            passed += change.low > 100 * margin + 1e-9
        elif metric == "wer":
            sums = [np.stack([(1 - one) * sizes, sizes], 1) for one in models]
            change = difference(*sums, error_rate, right_wrong=False, seed=0, resamples=RESAMPLES, bounds=error_bounds)
            passed += change.high < -margin - 1e-9
        else:
            sums = [np.stack([one * sizes, sizes], 1) for one in models]
            change = difference(*sums, ratio, right_wrong=False, seed=0, resamples=RESAMPLES, bounds=share_bounds)
            passed += change.low > margin + 1e-9
    return passed / trials


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(
    ("rows", "ties"),
    [(8, 0.85), (60, 0.95), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((20, 0.85), (200, 0.3)))],
)
@pytest.mark.parametrize("shape", ["either way", "few large"])
def test_a_model_that_is_worse_by_exactly_the_margin_seldom_passes(shape, rows, ties):
    assert passes("mean", shape, rows, ties, 200) <= 0.04


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("ties", [0, 0.3, 0.6, 0.85, 0.95])
@pytest.mark.parametrize("metric", ["mean", "ratio", "chrf", "wer"])
def test_a_model_that_is_worse_by_exactly_the_margin_passes_in_at_most_4_of_100_runs(metric, ties):
    shares = {
        (shape, rows): passes(metric, shape, rows, ties, 1000) for shape in SHAPES for rows in (8, 20, 60, 200, 500)
    }
    assert max(shares.values()) <= 0.04, shares


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 12, 20, 30, 60, 100, 200, 500])
def test_a_model_that_only_loses_rows_passes_in_at_most_4_of_100_runs(rows):
    """Computed: the outcome depends only on the number of lost rows. Worst case of all shares of equal rows to 95 %."""
    lost, lows = np.arange(min(rows, 45) + 1), []
    for number in lost:
        base, tuned = np.ones((2, rows))
        tuned[:number] = 0
        sums = [np.stack([one, np.ones(rows)], 1) for one in (base, tuned)]
        lows.append(difference(*sums, ratio, right_wrong=False, seed=0, bounds=share_bounds).low)
    margins = [margin for margin in np.linspace(0.05, 1, 96) if margin * rows <= 30]
    passed = [binom.pmf(lost[np.array(lows) > -margin], rows, margin).sum() for margin in margins]
    assert max(passed) <= 0.041, (max(passed), margins[int(np.argmax(passed))])
