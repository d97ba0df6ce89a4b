import math
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest, ttest_1samp

from llmtune.evaluate import intervals
from llmtune.evaluate.intervals import bound, draw_weights, learn
from llmtune.evaluate.metric import ratio
from llmtune.evaluate.paired_statistics import difference, difference_weighted, p_of_interval, share_bounds, widen
from llmtune.evaluate.verdict import verdict
from llmtune.records import Difference
from llmtune.store.score_records import Evaluation

ROWS, TRIALS = 60, 600


def ones(values):
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def flips(generator, rows, gained, lost, right=0.4):
    """Rows of which the shares `gained` and `lost` flip, and `right` stay right."""
    place = generator.random(rows)
    base = place < right + lost
    tuned = (place < right) | ((place >= right + lost) & (place < right + lost + gained))
    return ones(base), ones(tuned), gained - lost


def losses_of_rows_of_unequal_length(generator, rows=ROWS):
    tokens = generator.integers(5, 60, rows).astype(float)
    hardness = generator.gamma(2, 1, rows)
    base = tokens * (hardness + generator.gamma(1, 0.5, rows))
    tuned = tokens * (0.8 * hardness + generator.gamma(1, 0.5, rows))
    return np.stack([base, tokens], 1), np.stack([tuned, tokens], 1), -0.4


def skewed_scores(generator, rows):
    return ones(generator.beta(0.5, 1, rows)), ones(generator.beta(1, 1, rows)), 1 / 2 - 1 / 3


def a_few_long_tails(generator, rows):
    base = generator.lognormal(0, 1, rows)
    added, taken = generator.lognormal(0, 1, (2, rows))
    return ones(base + added), ones(0.9 * base + taken), -0.1 * math.exp(0.5)


def scores_that_seldom_move(generator, rows):
    base = generator.beta(0.5, 1, rows)
    return ones(base), ones(base + (generator.random(rows) < 0.2) * generator.beta(1, 2, rows)), 0.2 / 3


def coverage(draw, rows, right_wrong):
    """The share of intervals that cover the true difference."""
    generator, hits = np.random.default_rng(7), 0
    for _ in range(TRIALS):
        base, tuned, true = draw(generator, rows)
        found = difference(base, tuned, ratio, right_wrong=right_wrong, seed=0, resamples=1000)
        hits += found.low <= true <= found.high
    return hits / TRIALS


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("rows", [60, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (120, 300))])
@pytest.mark.parametrize(
    "shares", [(0.35, 0.05), (0.25, 0.25), (0.12, 0.02)], ids=lambda shares: "{}-{}".format(*shares)
)
def test_nineteen_of_twenty_right_or_wrong_intervals_cover_the_true_difference(rows, shares):
    assert 0.94 <= coverage(partial(flips, gained=shares[0], lost=shares[1]), rows, right_wrong=True) <= 0.99


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("rows", [60, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (120, 300))])
@pytest.mark.parametrize(
    "draw", [losses_of_rows_of_unequal_length, skewed_scores, a_few_long_tails, scores_that_seldom_move]
)
def test_nineteen_of_twenty_intervals_of_numbers_cover_the_true_difference(rows, draw):
    assert 0.93 <= coverage(draw, rows, right_wrong=False) <= 0.995


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("shares", [(0.01, 0.01), (0.02, 0.01), (0.95, 0.0)])
def test_with_hardly_any_or_only_flips_intervals_are_rather_too_wide(shares):
    assert coverage(partial(flips, gained=shares[0], lost=shares[1], right=0.05), 60, right_wrong=True) >= 0.95


@pytest.mark.usefixtures("drawn_once")
def test_without_a_difference_at_most_one_verdict_in_twenty_is_wrong():
    generator, wrong = np.random.default_rng(3), 0
    for _ in range(TRIALS):
        base, tuned, _ = flips(generator, 100, 0.08, 0.08)
        change = difference(base, tuned, ratio, right_wrong=True, seed=0, resamples=1000)
        evaluation = Evaluation({}, {}, {"exact_match": change}, (), 100)
        wrong += verdict(evaluation).word != "inconclusive"
    assert wrong / TRIALS <= 0.06


@pytest.mark.parametrize("rows", [8, 20, 60, 500])
@pytest.mark.parametrize("changed", [0.1, 0.3, 0.5])
def test_with_as_many_gains_as_losses_p_is_seldom_below_a_twentieth(rows, changed):
    """Computed, not sampled; with few changed answers no test comes closer to a twentieth."""
    level, critical = 0.0, 0
    for discordant in range(rows + 1):
        while discordant and binomtest(critical, discordant).pvalue <= 0.05:
            critical += 1
        level += binom.pmf(discordant, rows, changed) * 2 * binom.cdf(critical - 1, discordant, 0.5)
    assert level <= 0.05
    assert rows * changed < 25 or level >= 0.025


@pytest.mark.parametrize("rows", [80, 400])
@pytest.mark.parametrize("flips", [(5, 0), (6, 0), (9, 2), (10, 2), (12, 3), (20, 0), (40, 23), (41, 21), (60, 12)])
def test_p_of_right_or_wrong_rows_is_at_least_that_of_mcnemar_and_no_more_than_the_interval_allows(flips, rows):
    gained, lost = flips
    base = np.concatenate([np.zeros(gained), np.ones(rows - gained)])
    tuned = np.concatenate([np.ones(gained), np.zeros(lost), np.ones(rows - gained - lost)])
    found = difference(ones(base), ones(tuned), ratio, right_wrong=True, seed=0)
    exact = binomtest(lost, gained + lost).pvalue
    assert (found.p <= 0.05) == (found.low > 0)
    assert found.p >= 0.9 * exact
    assert found.p <= 3 * exact or exact < 0.0005
    sampled = difference(ones(base), ones(tuned), ratio, right_wrong=False, seed=0, bounds=share_bounds)
    assert (sampled.low, sampled.high, sampled.p) == (found.low, found.high, found.p)


@settings(max_examples=300, deadline=None)
@given(
    value=st.floats(-1, 1),
    below=st.floats(0, 1),
    above=st.floats(0, 1),
    units=st.integers(2, 2000),
    alpha=st.floats(1e-9, 0.9),
)
def test_an_interval_of_any_level_excludes_zero_if_and_only_if_p_is_below_it(value, below, above, units, alpha):
    low, high = value - below, value + above
    p = p_of_interval(value, low, high, units)
    assume(not math.isclose(p, alpha, rel_tol=1e-6, abs_tol=1e-300))
    wide = widen(Difference(value, low, high, p, units), alpha)
    assume(min(abs(wide.low), abs(wide.high)) > 1e-9)
    assert (wide.low > 0 or wide.high < 0) == (p < alpha)


def test_a_clear_change_has_a_p_below_any_correction():
    base, tuned = np.zeros(200), np.append(np.ones(80), np.zeros(120))
    found = difference(ones(base), ones(tuned), ratio, right_wrong=True, seed=0)
    assert 0 < found.p < 0.05 / 52 / 20


@pytest.mark.parametrize(("hits", "rows"), [(0, 5), (5, 5), (3, 8), (57, 60)])
def test_the_interval_of_a_share_equals_that_of_clopper_and_pearson(hits, rows):
    right_N = np.append(np.arange(rows) < hits, [0.0, 1.0])
    found = bound(lambda weights_RN: weights_RN @ right_N / rows, rows, 1, seed=0, resamples=40_000)
    low = beta.ppf(0.025, hits, rows - hits + 1) if hits else 0
    high = beta.ppf(0.975, hits + 1, rows - hits) if hits < rows else 1
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)


def test_the_interval_of_normal_numbers_is_at_least_that_of_student_and_not_much_wider():
    numbers = np.random.default_rng(0).normal(0.2, 1, 200)
    found, student = learn(numbers, seed=0), ttest_1samp(numbers, 0)
    low, high = student.confidence_interval(0.95)
    assert found.low <= low < high <= found.high
    assert found.high - found.low < 1.25 * (high - low)
    wide = difference(ones(np.zeros(200)), ones(numbers), ratio, right_wrong=False, seed=0)
    assert wide.p >= student.pvalue


def test_numbers_without_bounds_prove_nothing_on_a_few_rows_or_if_they_do_not_vary():
    assert math.isnan(learn(np.arange(9.0), seed=0).low)
    assert math.isfinite(learn(np.arange(10.0), seed=0).low)
    assert math.isnan(learn(np.ones(1000), seed=0).low)
    assert math.isnan(learn(0.1 + 0.2 + np.zeros(50) + np.arange(50) * 1e-17, seed=0).low)


def test_equal_models_differ_by_as_much_as_their_rows_do():
    few, many = (ones(np.arange(rows) / (rows - 1)) for rows in (71, 400))
    assert math.isnan(difference(few, few, ratio, right_wrong=False, seed=0).low)
    found = difference(many, many, ratio, right_wrong=False, seed=0)
    assert (found.value, found.p, found.n) == (0, 1, 400)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 400), rel=0.1)  # one pseudo-row of the range 1
    assert found.low == pytest.approx(-found.high, rel=0.1)


def test_one_or_two_changed_rows_show_no_range_of_changes():
    generator = np.random.default_rng(0)
    base = np.stack([generator.gamma(2, 1, 60) * (tokens := generator.integers(5, 60, 60)), tokens], 1)
    for changed, has_interval in ((1, False), (2, False), (3, True)):
        tuned = base.copy()
        tuned[:changed, 0] += 20
        assert math.isfinite(difference(base, tuned, ratio, right_wrong=False, seed=0).low) == has_interval


def test_a_few_equal_right_or_wrong_answers_do_not_prove_equality():
    sums = ones([1, 0, 1, 1, 0])
    found = difference(sums, sums, ratio, right_wrong=True, seed=0)
    assert found.value == 0
    assert found.low < -0.1
    assert found.high > 0.1
    assert found.p == 1


def test_rows_that_all_got_better_have_an_interval_and_not_a_point():
    found = difference(ones(np.zeros(10)), ones(np.ones(10)), ratio, right_wrong=True, seed=0)
    assert found.value == found.high == 1
    assert 0.2 < found.low < 0.9
    assert 2 / 2**10 <= found.p < 0.02


def test_the_same_seed_gives_the_same_interval_and_another_seed_a_similar_one():
    generator = np.random.default_rng(0)
    base, tuned = ones(generator.random(50)), ones(generator.random(50) + 0.2)
    first, again, other = (difference(base, tuned, ratio, right_wrong=False, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert other.low != first.low
    assert other.low == pytest.approx(first.low, abs=0.02)


def test_pairing_narrows_the_interval_if_rows_differ_more_than_models():
    generator = np.random.default_rng(0)
    hardness = generator.normal(0, 10, 80)
    found = difference(
        ones(hardness), ones(hardness + generator.normal(0.5, 0.1, 80)), ratio, right_wrong=False, seed=0
    )
    assert found.high - found.low < 0.1
    assert found.p < 0.001


def test_one_row_has_no_interval():
    found = difference(ones([0.1]), ones([0.9]), ratio, right_wrong=False, seed=0)
    assert math.isnan(found.low)
    assert found.p == 1


def test_a_score_that_is_not_finite_has_no_interval():
    tuned = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])  # without the last row: division by zero
    found = difference(ones([1, 2, 3]), tuned, ratio, right_wrong=False, seed=0)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.p == 1


def test_a_metric_by_sums_and_the_same_metric_by_draws_have_the_same_interval():
    base, tuned, _ = skewed_scores(np.random.default_rng(3), ROWS)
    by_sums = difference(base, tuned, ratio, right_wrong=False, seed=5, bounds=share_bounds)
    worst, best = share_bounds(np.concatenate([base, tuned]))
    base_also, tuned_also = np.concatenate([base, best, worst]), np.concatenate([tuned, worst, best])
    draws = difference_weighted(
        lambda weights_RN: ratio(weights_RN @ base_also),
        lambda weights_RN: ratio(weights_RN @ tuned_also),
        ROWS,
        1,
        seed=5,
    )
    assert (draws.value, draws.low, draws.high) == pytest.approx((by_sums.value, by_sums.low, by_sums.high))
    assert draws.p == pytest.approx(by_sums.p, abs=0.01)


def test_weights_add_up_and_memory_is_flat(monkeypatch):
    monkeypatch.setattr(intervals, "CHUNK_CELLS", 1000)
    parts = list(draw_weights(300, 250, seed=0, resamples=10))
    assert [part.shape for part in parts] == [(3, 300), (3, 300), (3, 300), (1, 300)]
    assert np.concatenate(parts).sum(1) == pytest.approx(250)
