"""Thresholds, prediction sets and bounds: guarantees on simulated rows, and MAPIE and crepes as referees."""

from __future__ import annotations

import math

import crepes
import numpy as np
import pytest
from mapie.classification import SplitConformalClassifier
from mapie.risk_control import FWERFixedSequenceTesting, MultiLabelClassificationController
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy.stats import binom, binomtest
from sklearn.base import BaseEstimator, ClassifierMixin
from support import decisions as simulated

from llmtune.evaluate.calibration import log_probabilities
from llmtune.evaluate.intervals import Floats, exact_interval
from llmtune.evaluate.selective_prediction import (
    FIRST_SHARE,
    fit_sets,
    highest_bound,
    least_rows,
    prove_risk,
    read_sets,
    risk_curve,
    rows_to_prove,
)

ERRORS = [pytest.param(error, marks=() if error == 0.15 else pytest.mark.slow) for error in simulated.SIGNALS]


class Known(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its probabilities."""

    def fit(self, X: Floats, y: Floats) -> Known:
        self.classes_ = np.arange(simulated.LABELS)
        return self

    def predict_proba(self, X: Floats) -> Floats:
        return X

    def predict(self, X: Floats) -> Floats:
        return X.argmax(1)


def draw_probabilities(rows: int, seed: int = 0) -> tuple[Floats, Floats]:
    drawn = simulated.make_population(0.15).draw(rows, np.random.default_rng(seed))
    return np.exp(log_probabilities(drawn.logits_PK, many=False)), drawn.labels_P


# Thresholds


@pytest.mark.parametrize("error", ERRORS)
def test_the_error_of_decided_answers_keeps_the_risk_in_95_of_100_runs(error: float) -> None:
    outcomes = [simulated.decide_as(error, rows, "raw", 200) for rows in simulated.ROWS]
    assert np.mean([one.held for one in outcomes]) >= 0.95
    assert min(one.held for one in outcomes) >= 0.92  # 0.95 less two standard errors of 200 runs
    assert outcomes[-1].decided > outcomes[0].decided  # more rows decide more


@pytest.mark.slow
@pytest.mark.parametrize("rows", simulated.ROWS)
@pytest.mark.parametrize("error", simulated.SIGNALS)
def test_the_guarantee_holds_in_1000_resamples(error: float, rows: int) -> None:
    assert simulated.decide_as(error, rows, "raw", 1000).held >= 0.95


def test_the_guarantee_breaks_on_rows_of_another_kind() -> None:
    assert simulated.decide_as(0.15, 1000, "raw", 50, shift=0.5).held < 0.3


def test_the_choice_among_checkpoints_breaks_the_guarantee_unless_the_error_is_divided() -> None:
    chosen, divided = (simulated.decide_as(0.05, 1000, how, 100) for how in ("chosen", "divided"))
    assert chosen.held < 0.93
    assert divided.held >= 0.95


@pytest.mark.slow
def test_half_of_the_rows_for_the_temperature_decides_less() -> None:
    outcomes = {how: simulated.decide_as(0.15, 200, how, 200) for how in ("raw", "same", "halves")}
    assert min(one.held for one in outcomes.values()) >= 0.92
    assert outcomes["halves"].decided < 0.6 * outcomes["raw"].decided


def test_mapie_rejects_the_same_thresholds() -> None:
    for seed in range(20):
        drawn = simulated.make_population(0.15).draw(400, np.random.default_rng(seed))
        confidence_N, wrong_N = drawn.answers()
        ranks = np.array([*range(max(least_rows(0.05, 0.95), 400 // FIRST_SHARE), 400, 4), 400])
        rate_G = np.cumsum(wrong_N[np.argsort(-confidence_N)])[ranks - 1] / ranks
        p_G = compute_hoeffding_bentkus_p_value(rate_G, ranks, 0.05, binary=True)[:, 0]
        passed = FWERFixedSequenceTesting(n_starts=1).run(p_G, 0.05)
        assert prove_risk(confidence_N, wrong_N, 0.05, 0.95).decided == (ranks[passed[-1]] if len(passed) else 0)


def test_a_threshold_is_a_confidence_and_counts_the_errors_above_it() -> None:
    confidence_N = np.linspace(0.5, 1, 200)
    wrong_N = confidence_N < 0.7
    found = prove_risk(confidence_N, wrong_N, 0.05, 0.95)
    assert found.decided == (confidence_N >= found.value).sum()
    assert found.wrong == (wrong_N & (confidence_N >= found.value)).sum() > 0
    assert binomtest(found.wrong, found.decided, 0.05, alternative="less").pvalue <= 0.05


def test_equal_confidences_are_decided_together() -> None:
    confidence_N = np.repeat([0.9, 0.6], [70, 130])
    found = prove_risk(confidence_N, confidence_N < 0.9, 0.05, 0.95)
    assert (found.value, found.decided, found.wrong) == (0.9, 70, 0)
    nothing = prove_risk(np.full(200, 0.9), np.arange(200) < 20, 0.05, 0.95)
    assert (nothing.value, nothing.decided) == (None, 0)


@pytest.mark.parametrize("rows", [0, 1, 58])
def test_too_few_rows_decide_nothing(rows: int) -> None:
    assert prove_risk(np.ones(rows), np.zeros(rows, bool), 0.05, 0.95).value is None


def test_59_rows_without_an_error_prove_5_percent() -> None:
    assert least_rows(0.05, 0.95) == 59
    assert prove_risk(np.ones(59), np.zeros(59, bool), 0.05, 0.95).decided == 59
    assert rows_to_prove(0.05, 0.95, 0.0) == 59


def test_the_planned_number_of_rows_has_80_percent_power() -> None:
    rows = rows_to_prove(0.05, 0.95, 0.025)
    assert rows is not None
    most = max(k for k in range(rows) if binom.cdf(k, rows, 0.05) <= 0.05)
    assert binom.cdf(most, rows, 0.025) >= 0.8
    assert rows_to_prove(0.05, 0.95, 0.05) is None


@pytest.mark.parametrize(("hits", "rows"), [(0, 10), (3, 40), (40, 40)])
def test_the_exact_interval_is_scipys(hits: int, rows: int) -> None:
    wanted = binomtest(hits, rows).proportion_ci(0.95, "exact")
    assert exact_interval(hits, rows, 0.05) == pytest.approx((wanted.low, wanted.high))


def test_the_curve_ends_at_the_error_rate_of_all_rows() -> None:
    curve = risk_curve(np.array([0.9, 0.9, 0.5, 0.7]), np.array([False, True, True, False]))
    assert curve == ((0.5, 0.5), (0.75, 1 / 3), (1.0, 0.5))


# Prediction sets


@pytest.mark.parametrize("rows", [8, 57, 200])
def test_mapie_and_crepes_have_the_same_sets(rows: int) -> None:
    probability_NK, labels_N = draw_probabilities(rows)
    new_MK, _ = draw_probabilities(50, seed=1)
    bounds_K = fit_sets(probability_NK, np.eye(simulated.LABELS, dtype=bool)[labels_N], 0.9, per_class=False)
    ours_MK = new_MK >= np.asarray(bounds_K)
    conformal = crepes.ConformalClassifier().fit(1 - probability_NK[np.arange(rows), labels_N])
    assert (ours_MK == conformal.predict_set(1 - new_MK, confidence=0.9, smoothing=False)).all()
    if rows > 10:  # MAPIE refuses fewer
        split = SplitConformalClassifier(Known().fit(probability_NK, labels_N), 0.9, prefit=True)
        _, sets_MK1 = split.conformalize(probability_NK, labels_N).predict_set(new_MK)
        assert (ours_MK == sets_MK1[:, :, 0]).all()


def test_crepes_has_the_same_sets_per_class() -> None:
    probability_NK, labels_N = draw_probabilities(300)
    new_MK, _ = draw_probabilities(50, seed=1)
    bounds_K = fit_sets(probability_NK, np.eye(simulated.LABELS, dtype=bool)[labels_N], 0.9, per_class=True)
    conformal = crepes.ConformalClassifier().fit(1 - probability_NK[np.arange(300), labels_N], bins=labels_N)
    for k in range(simulated.LABELS):
        theirs_MK = conformal.predict_set(1 - new_MK, bins=np.full(50, k), confidence=0.9, smoothing=False)
        assert (theirs_MK[:, k] == (new_MK[:, k] >= bounds_K[k])).all()


def test_mapie_has_the_same_bound_for_several_labels() -> None:
    generator = np.random.default_rng(0)
    probability_NK = generator.random((300, 5))
    right_NK = generator.random((300, 5)) < probability_NK
    right_NK[~right_NK.any(1), 0] = True
    grid = np.arange(0, 1, 0.005)
    theirs = MultiLabelClassificationController(lambda X: X, risk="recall", method="crc", predict_params=grid)
    (bound,) = theirs.calibrate(probability_NK, right_NK.astype(int)).best_predict_param
    assert fit_sets(probability_NK, right_NK, 0.9, per_class=False)[0] == pytest.approx(bound, abs=0.006)


def test_sets_cover_the_right_label_on_average() -> None:
    covered = []
    for seed in range(300):
        probability_NK, labels_N = draw_probabilities(60, seed)
        new_MK, truth_M = draw_probabilities(50, 1000 + seed)
        bounds_K = fit_sets(probability_NK, np.eye(simulated.LABELS, dtype=bool)[labels_N], 0.9, per_class=False)
        covered.append(read_sets(new_MK, bounds_K, many=False)[np.arange(50), truth_M].mean())
    assert 0.895 <= np.mean(covered) <= 0.925


def test_a_rare_class_is_covered_only_per_class() -> None:
    generator, common, rare = np.random.default_rng(0), [], []
    for _ in range(300):
        labels_N = (generator.random(400) < 0.1).astype(int)
        right_1 = generator.beta(np.where(labels_N == 1, 2, 8), 2)
        probability_NK = np.where(np.eye(2, dtype=bool)[labels_N], right_1[:, None], 1 - right_1[:, None])
        half = slice(200), slice(200, None)
        right_NK = np.eye(2, dtype=bool)[labels_N]
        for found, per_class in ((common, False), (rare, True)):
            bounds_K = fit_sets(probability_NK[half[0]], right_NK[half[0]], 0.9, per_class=per_class)
            is_rare = labels_N[half[1]] == 1
            found.append(read_sets(probability_NK[half[1]], bounds_K, many=False)[is_rare, 1].mean())
    assert np.mean(common) < 0.7
    assert np.mean(rare) >= 0.9


def test_a_class_with_too_few_rows_is_in_every_set() -> None:
    right_NK = np.eye(3, dtype=bool)[[0] * 20 + [1] * 8]
    assert fit_sets(np.full((28, 3), 1 / 3), right_NK, 0.9, per_class=True)[1:] == (0.0, 0.0)


def test_a_set_is_never_empty_if_one_label_is_right() -> None:
    assert read_sets(np.array([[0.4, 0.6]]), (0.9, 0.9), many=False).tolist() == [[False, True]]
    assert read_sets(np.array([[0.4, 0.6]]), (0.9, 0.9), many=True).tolist() == [[False, False]]


def test_the_bound_misses_at_most_its_share_of_new_values() -> None:
    values = np.arange(99.0)
    assert highest_bound(values, np.ones(99), 99, 0.05) == 4.0  # the fifth of 100 with the new one
    assert highest_bound(values[:18], np.ones(18), 18, 0.05) == -math.inf


def test_sets_of_several_labels_miss_at_most_their_share_on_average() -> None:
    generator, missed = np.random.default_rng(0), []
    for _ in range(300):
        probability_NK = generator.random((150, 4))
        right_NK = generator.random((150, 4)) < probability_NK**2
        bounds_K = fit_sets(probability_NK[:100], right_NK[:100], 0.8, per_class=False)
        chosen_NK = read_sets(probability_NK[100:], bounds_K, many=True)
        of_row = right_NK[100:].sum(1)
        missed.append(((right_NK[100:] & ~chosen_NK).sum(1) / np.maximum(of_row, 1)).mean())
    assert 0.17 <= np.mean(missed) <= 0.202
