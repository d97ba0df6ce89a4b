"""Calibration: its metrics against scikit-learn, its temperature against a search, and what a run does with them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax  # type: ignore[import-untyped]
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.calibration import (
    BINS,
    FEWEST_ROWS,
    RECORD,
    Chosen,
    calibrate,
    describe_reliability,
    fit_temperature,
    gather_choices,
    list_bins,
    measure_calibration,
    name_probabilities,
    read_rules,
    save_calibration,
)
from llmtune.recipe.task_facts import CALIBRATION
from llmtune.store.score_records import Calibration

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


@pytest.mark.promise("metric", "referee", equal="scikit-learn, within 1e-6 of the value", place="brier")
@pytest.mark.promise("metric", "referee", equal="scikit-learn, within 1e-6 of the value", place="nll")
def test_brier_and_likelihood_equal_those_of_scikit_learn() -> None:
    chosen = choices()
    p, right = softmax(chosen.logits_UK, 1), chosen.right_UK.argmax(1)
    assert measure_calibration("brier", chosen).value == pytest.approx(
        brier_score_loss(right, p, labels=range(3), scale_by_half=False)
    )
    assert measure_calibration("nll", chosen).value == pytest.approx(log_loss(right, p, labels=range(3)))


def with_outside(chosen: Chosen, every: int = 4) -> Chosen:
    """Return the choices with an unlisted reference in every fourth row."""
    right = chosen.right_UK.copy()
    right[::every] = False
    return replace(chosen, right_UK=right)


def test_an_unlisted_reference_counts_as_an_answer_of_probability_zero() -> None:
    chosen = with_outside(choices())
    p = np.hstack([softmax(chosen.logits_UK, 1), np.zeros((400, 1))])
    right = np.where(chosen.right_UK.any(1), chosen.right_UK.argmax(1), 3)
    assert measure_calibration("brier", chosen).value == pytest.approx(
        brier_score_loss(right, p, labels=range(4), scale_by_half=False)
    )
    bins = list_bins(measure_calibration("ece", chosen))
    assert sum(size for *_, size in bins) == 400
    assert sum(share * size for _, share, size in bins) == (right == chosen.logits_UK.argmax(1)).sum()
    logs = np.log(softmax(chosen.logits_UK, 1))
    expected = np.where(right < 3, logs[np.arange(400), right % 3], logs.mean(1))
    assert measure_calibration("nll", chosen).value == pytest.approx(-expected.mean())
    assert chosen.outside == 100


def test_unlisted_references_make_a_model_less_sure() -> None:
    honest = choices(4000, sharpness=1.0)
    test = with_outside(choices(4000, sharpness=1.0, seed=1))
    alone, counted = calibrate(honest), calibrate(with_outside(honest))
    assert isinstance(alone, Calibration)
    assert isinstance(counted, Calibration)
    assert (alone.outside, counted.outside) == (0, 1000)
    assert alone.temperature == pytest.approx(1, abs=0.05)
    before, after = (measure_calibration("ece", test, one.temperature).value for one in (alone, counted))
    assert after < before / 2


def test_brier_and_likelihood_of_several_labels_equal_those_of_scikit_learn() -> None:
    chosen = choices(many=True)
    p, right = expit(chosen.logits_UK).ravel(), chosen.right_UK.ravel()
    assert measure_calibration("brier", chosen).value == pytest.approx(brier_score_loss(right, p))
    assert measure_calibration("nll", chosen).value == pytest.approx(log_loss(right, p))


@pytest.mark.promise("metric", "referee", equal="scikit-learn, within 1e-6 of the value", place="ece")
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


@pytest.mark.parametrize("many", [False, True])
def test_a_model_that_is_always_right_does_not_become_certain(many: bool) -> None:
    chosen = choices(FEWEST_ROWS, many=many)
    right = chosen.logits_UK > 0 if many else chosen.logits_UK == chosen.logits_UK.max(1, keepdims=True)
    fitted = fit_temperature(replace(chosen, right_UK=right))
    assert 0.3 < fitted < 1, "without the prior, it is at its lowest bound"


def test_words_that_the_model_cannot_see_are_skipped() -> None:
    logits: dict[int, list[list[float]]] = {3: [[1.0, 0.0], [], [0.0, 2.0]], 5: [[]]}
    chosen = gather_choices(("O", "B-X"), logits, {3: [["O"], ["O"], ["B-X"]], 5: [["O"]]}, many=False)
    assert chosen is not None
    assert (chosen.rows, chosen.logits_UK.tolist()) == ((3, 3), [[1, 0], [0, 2]])
    assert chosen.right_UK.tolist() == [[True, False], [False, True]]
    assert gather_choices(("O", "B-X"), {5: [[]]}, {5: [["O"]]}, many=False) is None
    assert name_probabilities(("O", "B-X"), logits[3], many=False, temperature=2.0) == [
        pytest.approx({"O": expit(0.5), "B-X": expit(-0.5)}),
        {},
        pytest.approx({"O": expit(-1.0), "B-X": expit(1.0)}),
    ]


def test_the_words_of_a_row_are_drawn_together() -> None:
    chosen = replace(choices(4), rows=(0, 0, 0, 2))
    for metric in CALIBRATION:
        measured = measure_calibration(metric, chosen)
        assert (measured.at, len(measured.sums_NK)) == ((0, 2), 2)
        assert measured.value == pytest.approx(measure_calibration(metric, choices(4)).value)


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (None, "0 have choices"),
        (choices(FEWEST_ROWS - 1), "19 have choices"),
        (replace(choices(), rows=(1,) * 400), "1 have choices"),
        (replace(choices(), logits_UK=np.full((400, 3), np.nan)), "not finite"),
    ],
)
def test_without_enough_usable_rows_there_is_a_reason_instead_of_a_temperature(chosen: Chosen | None, why: str) -> None:
    found = calibrate(chosen)
    assert isinstance(found, str)
    assert why in found


def test_before_and_after_are_paired_on_the_test_rows() -> None:
    record = calibrate(choices(300))
    assert not isinstance(record, str)
    test = choices(300, seed=1)
    found = describe_reliability(test, record, seed=5)
    for metric in CALIBRATION:
        change = found.difference[metric]
        assert found.after[metric] == measure_calibration(metric, test, record.temperature).value
        assert change.value == pytest.approx(found.after[metric] - found.before[metric])
        assert metric == "ece" or change.low <= change.value <= change.high < 0, "the logits are three times too large"


def test_a_missing_record_is_none_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    record = calibrate(choices())
    assert not isinstance(record, str)
    assert read_rules(tmp_path / RECORD, Calibration) is None
    save_calibration(record, tmp_path)
    assert read_rules(tmp_path / RECORD, Calibration) == record
    (tmp_path / RECORD).write_text('{"temperature": "warm"}')
    with pytest.raises(EnvironmentProblem, match=r"damaged(.|\n)*llmtune evaluate"):
        read_rules(tmp_path / RECORD, Calibration)
