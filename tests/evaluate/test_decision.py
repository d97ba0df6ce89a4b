"""Decisions fitted on validation rows: what each key changes, and what belongs to a row."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logsumexp, softmax
from support.variants import CHAT

from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.calibration import Chosen, read_rules
from llmtune.evaluate.decision import (
    decide_answer,
    describe_need,
    fit_decision,
    measure_decisions,
    rate_rows,
    save_decision,
    score_scope,
)
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.inference import Answers, read_choices
from llmtune.evaluate.metric import own_interval
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.store.score_records import Decision

LABELS = ("red", "green", "blue")


def draw(rows: int = 400, *, many: bool = False, seed: int = 0) -> Chosen:
    """Return choices with honest probabilities."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, len(LABELS))) * 3
    if many:
        right = generator.random(logits.shape) < expit(logits)
    else:
        right = np.array([generator.multinomial(1, row) for row in softmax(logits, 1)]) > 0
    return Chosen(LABELS, logits, right, tuple(range(rows)), many)


def fit(chosen: Chosen | None = None, checkpoints: int = 1, **keys: Any) -> Decision:
    """Fit decisions on `chosen`."""
    record = fit_decision(EvaluateSection.model_validate(keys), chosen or draw(), checkpoints)
    assert isinstance(record, Decision)
    return record


def talk(rows: int, generator: np.random.Generator, listed: float) -> tuple[Chosen, NDArray[np.bool_]]:
    """Return the choices of a chat whose model is honest among LABELS, and which likeliest choices are wrong.

    The share `listed` of its references is in LABELS.
    """
    logits = generator.normal(size=(rows, len(LABELS))) * 3
    names = [LABELS[generator.multinomial(1, row).argmax()] for row in softmax(logits, 1)]
    names = [name if generator.random() < listed else "grey" for name in names]
    context = SimpleNamespace(inputs=SimpleNamespace(references=names, choices=LABELS), task=CHAT, recipe=None)
    answers = Answers(None, {}, dict(enumerate(logits.tolist())))
    chosen = read_choices(cast(EvalContext, context), answers)
    assert chosen is not None
    return chosen, np.array([LABELS[best] for best in logits.argmax(1)]) != names


def test_rows_whose_reference_is_no_choice_count_as_errors_of_decisions() -> None:
    generator, broken, fitted = np.random.default_rng(0), 0, 0
    for _ in range(40):
        record = fit(talk(200, generator, 0.7)[0], decide={"risk": 0.4, "confidence": 0.9})
        test, wrong = talk(2000, generator, 0.7)
        measures, _ = measure_decisions(record, test)
        if measures["decided"].value > 0.1:
            fitted += 1
            decided = measures["decided"].sums_NK[:, 0] > 0
            assert measures["decided_error"].value == pytest.approx(wrong[decided].mean())
            broken += bool(wrong[decided].mean() > 0.4)
    assert fitted >= 5, "else nothing is tried"
    assert broken <= 8, "one in ten may, by chance some more"
    assert record.outside == pytest.approx(60, abs=20)


def test_rows_whose_reference_is_no_choice_are_in_no_set_and_the_promised_coverage_holds() -> None:
    generator, covered = np.random.default_rng(0), []
    for _ in range(40):
        record = fit(talk(150, generator, 0.9)[0], sets=0.8)
        measures, _ = measure_decisions(record, talk(500, generator, 0.9)[0])
        covered.append(measures["set_coverage"].value)
    assert 0.8 <= np.mean(covered) < 0.83
    assert min(record.set_bounds) > 0
    out_of_reach = fit(talk(150, generator, 0.7)[0], sets=0.8)
    assert set(out_of_reach.set_bounds) == {0.0}
    measures, _ = measure_decisions(out_of_reach, talk(500, generator, 0.7)[0])
    assert measures["set_coverage"].value == pytest.approx(0.7, abs=0.06)


def test_risk_and_confidence_change_the_threshold() -> None:
    kept = [
        fit(decide={"risk": risk, "confidence": confidence}).threshold
        for risk, confidence in ((0.05, 0.95), (0.1, 0.95), (0.05, 0.7))
    ]
    decided = [one.decided for one in kept if one is not None]
    assert decided[0] < min(decided[1:])


def test_coverage_and_per_class_change_the_sets() -> None:
    bounds = fit(sets=0.9).set_bounds
    assert max(fit(sets=0.99).set_bounds) < min(bounds)
    assert len(set(bounds)) == 1
    assert len(set(fit(sets={"coverage": 0.9, "per_class": True}).set_bounds)) == 3


def test_the_share_of_false_alarms_changes_what_is_out_of_scope() -> None:
    few, more = (fit(out_of_scope=share).lowest_score for share in (0.02, 0.1))
    assert few is not None
    assert more is not None
    assert few < more
    too_few = fit(draw(8), out_of_scope=0.1)
    assert too_few.lowest_score is None
    assert decide_answer(too_few, [[-90.0, -90.0, -90.0]]) == {"out_of_scope": False}


def test_the_best_of_several_checkpoints_needs_more_rows() -> None:
    alone, best = (fit(checkpoints=number, decide={"risk": 0.1}).threshold for number in (1, 20))
    assert alone is not None
    assert best is not None
    assert best.decided < alone.decided
    assert best.confidence == alone.confidence == 0.95


def test_the_confidence_of_several_labels_is_that_of_all_answers() -> None:
    chosen = Chosen(LABELS, np.array([[2.0, -1.0, 0.5]]), np.array([[True, False, False]]), (0,), many=True)
    confidence_N, wrong_N = rate_rows(chosen)
    assert confidence_N[0] == pytest.approx(expit(2.0) * expit(1.0) * expit(0.5))
    assert wrong_N.tolist() == [True]  # the third label is predicted


def test_a_text_is_wrong_if_one_of_its_tags_is() -> None:
    right = np.eye(3, dtype=bool)[[0, 1, 2]]
    chosen = Chosen(LABELS, np.array([[3.0, 0, 0], [0, 2.0, 0], [0, 1.0, 0]]), right, (0, 0, 4))
    confidence_N, wrong_N = rate_rows(chosen)
    highest = softmax(chosen.logits_UK, 1).max(1)
    assert confidence_N == pytest.approx([highest[0] * highest[1], highest[2]])
    assert wrong_N.tolist() == [False, True]


def test_the_scope_score_is_the_energy_of_the_logits() -> None:
    chosen = draw(5)
    assert score_scope(chosen) == pytest.approx(logsumexp(chosen.logits_UK, 1))
    assert score_scope(replace(chosen, many=True)) == pytest.approx(np.log1p(np.exp(chosen.logits_UK)).sum(1))


@pytest.mark.parametrize("many", [False, True])
def test_answers_are_decided_as_the_test_rows_are(many: bool) -> None:
    record = fit(draw(many=many), decide={"risk": 0.3 if many else 0.2}, sets=0.9, out_of_scope=0.1)
    test = draw(60, many=many, seed=1)
    measures, curve = measure_decisions(record, test)
    found = [decide_answer(record, [logits]) for logits in test.logits_UK.tolist()]
    decided = [one["decision"] == "decide" for one in found]
    assert 0 < sum(decided) < 60
    assert measures["decided"].sums_NK[:, 0].tolist() == decided
    errors = measures["decided_error"]
    assert (errors.sums_NK[:, 1] > 0).tolist() == decided
    assert errors.value == pytest.approx(rate_rows(test)[1][decided].mean())
    assert own_interval(errors, 0).n == sum(decided)
    assert measures["set_size"].sums_NK[:, 0].tolist() == [len(one["set"]) for one in found]
    assert measures["false_alarms"].sums_NK[:, 0].tolist() == [one["out_of_scope"] for one in found]
    assert curve[-1] == (1.0, pytest.approx(rate_rows(test)[1].mean()))


def test_one_row_of_each_group_decides() -> None:
    chosen = draw(6).one_row_each([0, 0, 1, 2, 2, 1])
    assert chosen.rows == (0, 2, 3)
    assert draw(6).one_row_each(()).rows == tuple(range(6))


def test_a_record_survives_its_file(tmp_path: Any) -> None:
    record = fit(decide={"risk": 0.1}, sets=0.9, out_of_scope=0.1)
    save_decision(record, tmp_path)
    assert read_rules(tmp_path / "decision.json", Decision) == record
    (tmp_path / "decision.json").write_text('{"labels": 3}')
    with pytest.raises(EnvironmentProblem, match="damaged"):  # not: no decisions
        read_rules(tmp_path / "decision.json", Decision)


def test_the_need_for_rows_counts_checkpoints() -> None:
    section = EvaluateSection.model_validate({"decide": {"risk": 0.05}})
    text = describe_need(section, 500, 1)
    assert text.startswith("evaluate.decide: 59 confident validation rows without an error")
    assert "ask" not in text
    best = describe_need(section, 60, 10)
    assert "104 confident validation rows without an error" in best
    assert "The run has 60 validation rows: too few, so every answer will be `ask`." in best


def test_the_interval_of_a_share_is_exact_and_that_of_a_mean_is_around_it() -> None:
    measures, _ = measure_decisions(fit(decide={"risk": 0.2}, sets=0.9), draw(200, seed=1))
    share, size = (own_interval(measures[name], 0) for name in ("decided", "set_size"))
    assert share.test == "Clopper-Pearson"
    assert size.low < size.value < size.high
    grouped = replace(measures["decided"], clusters=tuple(i // 10 for i in range(200)))
    assert own_interval(grouped, 0).groups == 20
