"""Calibration: its metrics against scikit-learn, its temperature against a search, and what a run does with them."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from llmtune.evaluate.calibration import (
    BINS,
    Chosen,
    fit_temperature,
    list_bins,
    measure_calibration,
)

LABELS = ("red", "green", "blue")


def choices(count: int = 400, *, many: bool = False, sharpness: float = 3.0, seed: int = 0) -> Chosen:
    """Return choices of a model whose logits are `sharpness` times too large."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, len(LABELS))) * 1.5
    if many:
        right = random.random(logits.shape) < expit(logits)
    else:
        right = np.array([random.multinomial(1, softmax(row)) for row in logits]) > 0
    return Chosen(LABELS, logits * sharpness, right, tuple(range(count)), many)


def test_brier_and_likelihood_equal_those_of_scikit_learn() -> None:
    chosen = choices()
    p, right = softmax(chosen.logits_UK, 1), chosen.right_UK.argmax(1)
    assert measure_calibration("brier", chosen).value == pytest.approx(
        brier_score_loss(right, p, labels=range(3), scale_by_half=False)
    )
    assert measure_calibration("nll", chosen).value == pytest.approx(log_loss(right, p, labels=range(3)))


def test_brier_and_likelihood_of_several_labels_equal_those_of_scikit_learn() -> None:
    chosen = choices(many=True)
    p, right = expit(chosen.logits_UK).ravel(), chosen.right_UK.ravel()
    assert measure_calibration("brier", chosen).value == pytest.approx(brier_score_loss(right, p))
    assert measure_calibration("nll", chosen).value == pytest.approx(log_loss(right, p))


@pytest.mark.parametrize("many", [False, True])
def test_bins_and_calibration_error_equal_the_curve_of_scikit_learn(many: bool) -> None:
    chosen = choices(many=many)
    p = chosen.probabilities()
    confidence = p.ravel() if many else p.max(1)
    right = chosen.right_UK.ravel() if many else chosen.right_UK[np.arange(len(p)), p.argmax(1)]
    measured = measure_calibration("ece", chosen)
    bins = np.array(list_bins(measured))
    shares, means = calibration_curve(right, confidence, n_bins=BINS)
    assert bins[:, 0] == pytest.approx(means)
    assert bins[:, 1] == pytest.approx(shares)
    assert bins[:, 2].sum() == confidence.size
    assert measured.value == pytest.approx(np.average(np.abs(shares - means), weights=bins[:, 2]))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_the_temperature_finds_how_much_too_large_the_logits_are(many: bool, sharpness: float) -> None:
    chosen = choices(4000, many=many, sharpness=sharpness)
    fitted = fit_temperature(chosen)
    assert fitted == pytest.approx(sharpness, rel=0.08)
    likelihoods = {t: measure_calibration("nll", chosen, t).value for t in np.geomspace(fitted / 2, fitted * 2, 201)}
    assert min(likelihoods, key=likelihoods.__getitem__) == pytest.approx(fitted, rel=0.02)
