"""What a control run and a teacher make of a verdict, and gates on a control run."""

from dataclasses import replace

import numpy as np
import pytest

from llmtune.evaluate.control_run_verdict import count_beaten, describe_teacher, judge_control_run
from llmtune.evaluate.control_runs import gap_share, gap_shares
from llmtune.evaluate.gates import check_gates, list_power
from llmtune.evaluate.metric import PairedMeasures, measure_means
from llmtune.evaluate.verdict import judge_run
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.records import Difference
from llmtune.report.control_sections import control_run_section
from llmtune.store.control_scores import ControlScores, ModelCosts, TeacherScores
from llmtune.store.score_records import Evaluation

UP, LEVEL, DOWN = (0.2, 0.1, 0.3), (0.0, -0.1, 0.1), (-0.2, -0.3, -0.1)


def change(ends, rows=100):
    value, low, high = ends
    return Difference(value, low, high, 0.5 if low < 0 < high else 1e-6, rows)


def control(rows=100, **ends):
    """A control run with the score 0.5 in each metric, from which the tuned model differs by `ends`."""
    changes = {name: change(one, rows) for name, one in ends.items()}
    tuned = {name: 0.5 + one.value for name, one in changes.items()}
    return ControlScores("filter", "GRPO beat filter", "what", "", dict.fromkeys(ends, 0.5), changes, tuned)


def evaluation(control_run, teacher=None):
    scores = {"exact_match": 0.1}, {"exact_match": 0.5}, {"exact_match": change(UP)}
    return Evaluation(*scores, (), 100, control_run=control_run, teacher=teacher)


@pytest.mark.parametrize(
    ("ends", "word", "sentence"),
    [
        ({"exact_match": UP}, "yes", "better in exact match (0.7000 against 0.5000, difference +0.1000 to +0.3000)."),
        ({"exact_match": DOWN}, "no", "worse in exact match (0.3000 against 0.5000"),
        ({"loss": DOWN}, "yes", "better in loss (0.3000 against 0.5000"),
        ({"loss": UP}, "no", "worse in loss"),
        ({"exact_match": UP, "loss": UP}, "inconclusive", "better in exact match (0.7000"),
        ({"exact_match": LEVEL}, "inconclusive", "no metric shows a clear difference: exact match (0.5000"),
        ({}, "inconclusive", "no metric shows a clear difference."),
    ],
)
def test_the_verdict_says_whether_the_control_run_was_beaten(ends, word, sentence):
    assert judge_control_run(control(**ends))[0] == word
    reason = judge_run(evaluation(control(**ends)), (), 0.05).reason
    assert f"GRPO beat filter: {word}, {sentence}" in reason


def test_too_few_rows_are_inconclusive():
    assert judge_control_run(control(rows=9, exact_match=UP))[0] == "inconclusive"


def test_without_a_control_run_the_verdict_says_what_it_does_not_know():
    off = replace(control(), why_none="reinforce.control is false")
    assert judge_control_run(off)[0] == "unknown"
    result = judge_run(evaluation(off), (), 0.05)
    assert result.reason.endswith("GRPO beat filter: unknown, because reinforce.control is false.")
    assert result.word == "better"  # the base is beaten all the same
    assert "filter" not in judge_run(evaluation(None), (), 0.05).reason


@pytest.mark.parametrize(
    ("gate", "ends", "passed"),
    [
        ("exact_match.low > filter", UP, True),
        ("exact_match.low > filter", DOWN, False),
        ("exact_match.low > filter - 0.15", LEVEL, True),
        ("exact_match > filter", UP, True),
        ("exact_match > filter", DOWN, False),
        ("exact_match.low > filter", LEVEL, None),
    ],
)
def test_gates_compare_with_the_control_run(gate, ends, passed):
    section = EvaluateSection(gates=(gate,), when_unsure="report")
    (result,) = check_gates(section, evaluation(control(exact_match=ends)))
    assert result.passed is passed
    assert ("difference from filter" in result.wanted) is (".low" in gate)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (replace(control(), why_none="reinforce.control is false"), "not measured: reinforce.control is false"),
        (replace(control(), left_out={"exact_match": "other classes"}), "not measured: other classes"),
        (None, "not measured: filter has no exact_match on these rows"),
    ],
)
def test_a_gate_without_scores_of_the_control_run_fails_with_the_reason(record, why):
    (result,) = check_gates(EvaluateSection(gates=("exact_match.low > filter",)), evaluation(record))
    assert (result.passed, result.got) == (False, why)


def test_the_power_of_the_rows_is_planned_against_the_control_run():
    power = list_power(EvaluateSection(gates=("exact_match.low > filter",)), evaluation(control(exact_match=UP)))
    assert (power[0].gate, power[0].against) == ("exact_match.low > filter", "filter")


def test_several_seeds_count_how_often_they_beat_their_own_control_run():
    seeds = [evaluation(control(exact_match=ends)) for ends in (UP, UP, LEVEL)]
    told = count_beaten(seeds)
    assert told == "Over 3 seeds, each with its own control run, GRPO beat filter: yes 2, no 0, inconclusive 1."
    assert count_beaten([evaluation(None)]) == ""


def measures(**models):
    return {
        model: {"loss": replace(measure_means("loss", values, ""), at=tuple(range(len(values))))}
        for model, values in models.items()
    }


def test_the_share_of_the_gap_is_that_of_the_means_with_an_interval():
    generator = np.random.default_rng(0)
    base = generator.normal(3.0, 0.5, 200)
    tuned, teacher = base - 0.5 + generator.normal(0, 0.1, 200), base - 1.0 + generator.normal(0, 0.1, 200)
    made = measures(base=base, tuned=tuned, teacher=teacher)
    share = gap_shares(PairedMeasures(made["base"], made["tuned"]), made["teacher"], 0)["loss"]
    assert share.value == pytest.approx((tuned.mean() - base.mean()) / (teacher.mean() - base.mean()))
    assert share.low < share.value < share.high
    assert 0.45 < share.low < 0.5 < share.high < 0.55
    assert share.n == 200


def test_the_interval_of_the_share_contains_the_true_share_in_95_of_100_samples():
    generator, inside = np.random.default_rng(1), 0
    for _ in range(100):
        base = generator.normal(3.0, 0.5, 60)
        models = base, base - 0.6 + generator.normal(0, 0.4, 60), base - 1.0 + generator.normal(0, 0.4, 60)
        share = gap_share(*(measure_means("loss", one, "") for one in models), 0)
        inside += share.low <= 0.6 <= share.high
    assert 88 <= inside <= 100


def test_rows_that_belong_together_widen_the_interval_of_the_share():
    generator = np.random.default_rng(2)
    base = np.repeat(generator.normal(3.0, 0.5, 20), 10)
    tuned, teacher = (base - gain + np.repeat(generator.normal(0, 0.3, 20), 10) for gain in (0.5, 1.0))
    models = [measure_means("loss", one, "") for one in (base, tuned, teacher)]
    clusters = tuple(np.repeat(range(20), 10).tolist())
    apart, together = gap_share(*models, 0), gap_share(*(replace(one, clusters=clusters) for one in models), 0)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_a_teacher_that_is_not_clearly_better_has_no_gap_to_close():
    base = np.random.default_rng(3).normal(3.0, 0.5, 100)
    made = measures(base=base, tuned=base - 0.5, teacher=base + np.random.default_rng(4).normal(0, 0.5, 100))
    assert gap_shares(PairedMeasures(made["base"], made["tuned"]), made["teacher"], 0) == {}
    none = TeacherScores({"loss": 3.0}, {"loss": change(DOWN)}, {})
    assert describe_teacher(none).startswith("No share of a gap")


def test_the_section_has_a_column_for_each_model():
    costs = {"tuned": ModelCosts(10, 40, 3.0), "teacher": ModelCosts(20, 80, 1.5)}
    teacher = TeacherScores(
        {"exact_match": 0.9}, {"exact_match": change(DOWN)}, {"exact_match": change((0.5, 0.4, 0.6))}, costs
    )
    section = control_run_section(evaluation(control(exact_match=UP), teacher), "chat")
    table, *_, shown = section.blocks
    heads = [one if isinstance(one, str) else one.heading for one in table.columns]
    assert heads == [
        "metric",
        "base",
        "filter",
        "tuned",
        "teacher",
        "tuned − filter",
        "tuned − teacher",
        "share of the gap",
    ]
    assert table.rows[0][1:5] == ["0.1000", "0.5000", "0.5000", "0.9000"]
    assert table.rows[0][-1] == "50% (40% to 60%)"
    assert shown.rows == [["tuned", "10", "40 B", "3.000"], ["teacher", "20", "80 B", "1.500"]]
    assert control_run_section(evaluation(None), "chat").blocks == []
