import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from llmtune.evaluate.metric_info import list_sides
from llmtune.evaluate.seed_spread import describe_gain, describe_spread, spread, warn_of_spread
from llmtune.evaluate.verdict import still_falling, verdict
from llmtune.records import Difference
from llmtune.report.report_page import headline
from llmtune.report.score_sections import champion_section
from llmtune.store.report_record import SeedRun, Seeds, Spread, Verdict
from llmtune.store.score_records import (
    Champion,
    Contamination,
    Decided,
    Decision,
    Evaluation,
    GateResult,
    NewRows,
    Slice,
    Threshold,
)

BETTER, WORSE, OPEN, UNKNOWN = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.2), (math.nan, math.nan)
LESS, MORE = (-0.3, -0.1), (0.1, 0.3)


def judge_changes(baseline=None, **changes):
    return verdict(Evaluation({}, {}, changes, (), 100, baseline=baseline))


def differences(n=100, **intervals):
    ps = {metric: 0.5 if ends in (OPEN, UNKNOWN) else 0.001 for metric, ends in intervals.items()}
    return {metric: Difference(0.0, *ends, ps[metric], n) for metric, ends in intervals.items()}


def judge(n=100, baseline=None, **intervals):
    return judge_changes(baseline, **differences(n, **intervals))


@pytest.mark.parametrize(
    ("intervals", "word", "shown", "tone"),
    [
        ({"exact_match": BETTER, "loss": LESS, "choice_accuracy": BETTER}, "better", "choice accuracy", "better"),
        ({"loss": LESS}, "better", "loss", "better"),
        ({"loss": LESS, "exact_match": OPEN}, "better", "loss", "better"),
        ({"loss": LESS, "exact_match": BETTER}, "better", "exact match", "better"),
        ({"perplexity": LESS, "accuracy": OPEN}, "better", "perplexity", "better"),
        ({"accuracy": BETTER, "f1": BETTER}, "better", "f1", "better"),
        ({"wer": LESS, "cer": LESS, "loss": LESS}, "better", "wer", "better"),
        ({"length_ratio": WORSE, "rouge1": BETTER}, "better", "rouge1", "better"),
        ({"kl": MORE, "accuracy": BETTER, "margin": BETTER}, "better", "accuracy", "better"),
        ({"kl": MORE, "loss": LESS}, "better", "loss", "better"),
        ({"loss": MORE, "exact_match": OPEN}, "worse", "loss", "worse"),
        ({"loss": MORE, "exact_match": OPEN, "rougeL": WORSE}, "worse", "rougeL", "worse"),
        ({"exact_match": WORSE, "loss": (-0.1, 0.1)}, "worse", "exact match", "worse"),
        ({"mae": MORE, "pearson": OPEN}, "worse", "mae", "worse"),
        ({"kl": MORE, "accuracy": WORSE}, "worse", "accuracy", "worse"),
        ({"exact_match": BETTER, "loss": MORE}, "mixed", "exact match", "better"),
        ({"exact_match": BETTER, "choice_accuracy": WORSE}, "mixed", "choice accuracy", "worse"),
        ({"loss": LESS, "exact_match": OPEN, "rougeL": WORSE}, "mixed", "rougeL", "worse"),
        ({"bleu": BETTER, "ter": MORE}, "mixed", "bleu", "better"),
        ({"exact_match": OPEN, "loss": OPEN}, "inconclusive", "exact match", "unsure"),
        ({"loss": LESS, "exact_match": BETTER, "choice_accuracy": OPEN}, "inconclusive", "choice accuracy", "unsure"),
        ({"length_ratio": BETTER, "rouge1": OPEN}, "inconclusive", "rouge1", "unsure"),
        ({"kl": MORE}, "inconclusive", "kl", "worse"),
        ({"exact_match": UNKNOWN}, "inconclusive", "exact match", "unsure"),
    ],
)
def test_the_verdict_follows_the_intervals_and_the_headline_supports_it(intervals, word, shown, tone):
    changes = differences(**intervals)
    assert judge_changes(**changes).word == word
    row = headline(Evaluation({}, {}, changes, (), 100), word)
    assert (row.name, row.tone) == (shown, tone)


def test_a_gain_on_too_few_rows_does_not_decide_the_verdict():
    changes = {"exact_match": Difference(0.2, *BETTER, 0.1, 4), "loss": Difference(-0.2, *LESS, 0.01, 50)}
    assert headline(Evaluation({}, {}, changes, (), 50), "better").name == "loss"
    assert headline(Evaluation({}, {}, {}, (), 50), "inconclusive") is None


def test_a_gain_without_choice_accuracy_may_be_format_only():
    found = judge(exact_match=BETTER, loss=LESS, choice_accuracy=OPEN)
    assert found.word == "inconclusive"
    assert "format" in found.reason


def test_a_model_that_chooses_all_answers_rightly_has_learned_more_than_the_format():
    changes = differences(exact_match=BETTER, choice_accuracy=OPEN)
    result = verdict(Evaluation({"choice_accuracy": 0.9}, {"choice_accuracy": 1.0}, changes, (), 100))
    assert (result.word, "format" in result.reason) == ("better", False)


@pytest.mark.parametrize(
    ("accuracy", "loss", "reason"),
    [
        (0.04, MORE, "Worse in loss; accuracy is better, but not clearly."),
        (-0.04, LESS, "Better in loss; accuracy is worse, but not clearly."),
        (-0.04, MORE, "Worse in loss; no metric got better."),
        (0.04, LESS, "Better in loss. No metric got worse."),
    ],
)
def test_a_verdict_names_a_more_telling_metric_with_a_score_on_the_other_side(accuracy, loss, reason):
    changes = differences(loss=loss) | {"accuracy": Difference(accuracy, accuracy - 0.1, accuracy + 0.1, 0.4, 100)}
    assert judge_changes(**changes).reason == reason
    assert judge_changes(**changes | {"kl": Difference(0.1, 0.05, 0.2, 0.4, 100)}).reason.startswith(reason)


def test_more_rows_are_not_proposed_where_nothing_changed_at_all():
    same = {"accuracy": Difference(0.0, -0.01, 0.01, 1.0, 100), "loss": Difference(0.0, -0.1, 0.1, 1.0, 100)}
    assert "held-out rows" not in judge_changes(**same).reason
    assert "Use more held-out rows" in judge_changes(**same | {"loss": Difference(0.01, -0.1, 0.1, 1.0, 100)}).reason


def test_too_few_rows_are_inconclusive():
    found = judge(n=9, exact_match=BETTER)
    assert found.word == "inconclusive"
    assert "9 held-out rows" in found.reason


def test_one_finding_in_three_units_is_named_once():
    assert judge(loss=LESS, bits_per_byte=LESS, perplexity=LESS).reason.startswith("Better in loss. No")


def test_a_cost_is_mentioned_but_decides_nothing():
    found = judge(kl=MORE, accuracy=BETTER)
    assert found.reason.endswith("The cost: the tuned model is farther from the base model (kl).")
    assert "kl" not in judge(kl=OPEN, accuracy=BETTER).reason


@pytest.mark.parametrize(
    ("intervals", "start"),
    [
        ({"accuracy": BETTER}, "Better in accuracy than the most frequent class. No metric got worse."),
        ({"accuracy": WORSE}, "Worse in accuracy than the most frequent class; no metric got better."),
        (
            {"f1_macro": BETTER, "accuracy": WORSE},
            "Better in f1 macro than the most frequent class, worse in accuracy.",
        ),
        ({"accuracy": OPEN}, "No metric shows a clear difference from the most frequent class."),
        ({"accuracy": OPEN, "kl": MORE}, "No metric of quality shows a clear difference from the most"),
    ],
)
def test_the_reason_names_the_baseline(intervals, start):
    assert judge(baseline="the most frequent class", **intervals).reason.startswith(start)


def test_every_metric_beyond_the_bar_is_named():
    assert judge(wer=LESS, cer=LESS).reason.startswith("Better in wer and cer. No")
    assert judge(wer=OPEN, cer=LESS).reason.startswith("Better in cer. No")


@pytest.mark.parametrize(("micro", "named"), [(0.25, "accuracy"), (0.31, "accuracy and f1 micro")])
def test_micro_f1_is_named_with_accuracy_only_if_they_differ(micro, named):
    values = {"accuracy": 0.25, "f1_micro": micro}
    changes = {metric: Difference(value, *BETTER, 0.001, 50) for metric, value in values.items()}
    assert judge_changes(**changes).reason.startswith(f"Better in {named}. No")


def test_scores_of_only_the_tuned_model_are_inconclusive():
    found = verdict(Evaluation({}, {"loss": 1.0}, {}, (), 100))
    assert found.word == "inconclusive"
    assert "nothing can be compared" in found.reason


@pytest.mark.parametrize("evaluation", [None, Evaluation({}, {}, {}, (), 0)])
def test_without_an_evaluation_the_verdict_is_inconclusive(evaluation):
    assert verdict(evaluation).word == "inconclusive"


def looked_at(**ps):
    return judge_changes(**{metric: Difference(0.1, *BETTER, p, 80) for metric, p in ps.items()})


def test_one_of_many_metrics_that_moves_a_little_is_chance():
    others = dict.fromkeys(["rouge1", "rouge2", "rougeL", "chrf", "bleu"], 0.6)
    assert looked_at(exact_match=0.03).word == "better"
    found = looked_at(exact_match=0.03, **others)
    assert found.word == "inconclusive"
    bar = "The bar for p is 0.0083 (0.05 / 6 metrics, Holm's correction)."
    assert f"Below 0.05, but not beyond the bar: exact match (p 0.030). {bar}" in found.reason
    assert looked_at(exact_match=0.004, **others).reason.startswith("Better in exact match. No")


def test_each_metric_that_holds_makes_it_easier_for_the_next():
    assert looked_at(exact_match=0.01, rougeL=0.03).reason.startswith("Better in exact match and rougeL")
    assert looked_at(exact_match=0.03, rougeL=0.04).word == "inconclusive"


def test_one_number_in_three_units_counts_as_one_comparison():
    units = dict.fromkeys(["loss", "bits_per_byte", "perplexity"], Difference(-0.1, *LESS, 0.04, 80))
    assert judge_changes(**units).word == "better"
    assert judge_changes(**units, wer=units["loss"]).word == "inconclusive"


def test_without_any_change_eight_metrics_rarely_give_a_verdict():
    """Without any change p is uniform; the interval agrees with p at 5 %."""
    names = ["exact_match", "rouge1", "rouge2", "rougeL", "chrf", "bleu", "f1", "accuracy"]
    draws = np.random.default_rng(3).random((2000, len(names)))

    def word(ps):
        ends = [BETTER if p < 0.05 else OPEN for p in ps]
        told = zip(names, ps, ends, strict=True)
        return judge_changes(**{name: Difference(0.1, *end, p, 80) for name, p, end in told}).word

    false = sum(word(ps) != "inconclusive" for ps in draws.tolist()) / len(draws)
    assert 0.03 < false < 0.07
    assert (draws < 0.05).any(1).mean() > 0.3, "what intervals alone would say"


def challenge_often(**ps: float) -> Verdict:
    """Return the verdict on one of 52 models: worse than the champion in each metric, with these p."""
    change = {name: Difference(-0.2, -0.3, -0.1, p, 400) for name, p in ps.items()}
    champion = Champion("releases/best.json", {}, change, {}, rows=400)
    return verdict(Evaluation({}, {}, {}, (), 400, champion=champion), chance=0.05 / 52)


def test_with_many_looks_metrics_beyond_the_bar_are_worse_and_the_bar_is_stated():
    found = challenge_often(accuracy=2e-5, f1_macro=1e-4, rougeL=0.001)
    assert found.word == "worse"
    assert found.reason.startswith("Worse in accuracy and f1 macro than the champion; no metric got better.")
    assert "chance" not in found.reason
    near = challenge_often(accuracy=0.0005, f1_macro=0.0009, rougeL=0.02)
    assert near.word == "inconclusive"
    bar = "The bar for p is 0.00032 (0.05 / 52 looks / 3 metrics, Holm's correction)."
    assert f"accuracy (p 0.00050), f1 macro (p 0.00090), rougeL (p 0.020). {bar}" in near.reason


RULES = Decision((), False, 100, 1, Threshold(0.05, 0.9, 0.8, 100, 90, 2), (0.1,), 0.9, false_alarms=0.05)


@pytest.mark.parametrize(
    ("metric", "before", "after", "word"),
    [
        ("set_coverage", 0.92, 0.98, "inconclusive"),
        ("set_coverage", 0.98, 0.92, "inconclusive"),
        ("set_coverage", 0.95, 0.85, "worse"),
        ("set_coverage", 0.8, 0.95, "better"),
        ("decided_error", 0.04, 0.01, "inconclusive"),
        ("decided_error", 0.04, 0.08, "worse"),
        ("decided_error", 0.08, 0.04, "better"),
        ("false_alarms", 0.04, 0.01, "inconclusive"),
        ("false_alarms", 0.01, 0.09, "worse"),
        ("decided", 0.4, 0.8, "better"),
        ("set_size", 4.0, 2.0, "better"),
    ],
)
def test_only_a_score_that_misses_its_target_is_worse_and_beyond_the_target_is_not_better(metric, before, after, word):
    value = after - before
    change = Difference(value, value - 0.01, value + 0.01, 1e-6, 300)
    champion = Champion("runs/best", {metric: before}, {metric: change}, {}, {metric: after}, rows=300)
    evaluation = Evaluation({}, {metric: after}, {}, (), 300, champion=champion, decided=Decided(RULES))
    assert verdict(evaluation).word == word
    (row,) = champion_section(evaluation, "classify").blocks[1].rows
    assert row[3].tone == {"inconclusive": "unsure"}.get(word, word)


def test_smaller_sets_that_miss_their_coverage_are_not_better():
    change = {
        "set_size": Difference(-2.0, -2.1, -1.9, 1e-6, 300),
        "set_coverage": Difference(-0.1, -0.2, 0.01, 0.1, 300),
    }
    scores = {"set_size": 4.0, "set_coverage": 0.95}, {"set_size": 2.0, "set_coverage": 0.85}
    champion = Champion("runs/best", scores[0], change, {}, scores[1], rows=300)
    evaluation = Evaluation({}, scores[1], {}, (), 300, champion=champion, decided=Decided(RULES))
    assert verdict(evaluation).word == "inconclusive"


def test_a_length_ratio_is_better_the_nearer_it_is_to_one():
    sides = [list_sides({"length_ratio": a}, {"length_ratio": b})["length_ratio"] for a, b in ((0.5, 0.9), (1.5, 1.2))]
    assert sides == [1, -1]
    assert list_sides({"length_ratio": 0.8}, {"length_ratio": 1.2})["length_ratio"] == 0


def on_new(
    new: tuple[float, float, float],
    gates: tuple[GateResult, ...] = (),
    old: Difference | None = None,
    overall: tuple[float, float, float] = (0.2, 0.1, 0.3),
) -> Verdict:
    """Return the verdict on a model by its difference from the champion on new rows; it is better on all rows."""
    rows = Slice("new", 60, {"accuracy": 0.2}, {"accuracy": 0.4}, {})
    apart = {"accuracy": old} if old else {}
    change = {"accuracy": Difference(*new, 0.5 if new[1] < 0 < new[2] else 1e-4, 60)}
    judged = NewRows(rows, {}, apart, 60, {"accuracy": 0.4 - new[0]}, {"accuracy": 0.4}, change)
    moved = {"accuracy": Difference(*overall, 0.5 if overall[1] < 0 < overall[2] else 1e-5, 300)}
    champion = Champion("runs/best", {"accuracy": 0.5}, moved, {}, {"accuracy": 0.7}, rows=300, new=judged)
    return verdict(Evaluation({}, {"accuracy": 0.7}, {}, (), 300, champion=champion), gates=gates)


LOWER = Difference(-0.4, -0.5, -0.3, 1e-6, 60)


def test_a_loss_on_new_rows_is_not_outweighed_by_old_rows():
    assert on_new((0.0, -0.1, 0.1)).word == "better"
    found = on_new((-0.2, -0.3, -0.1))
    assert found.word == "mixed"
    assert "On 60 test rows that are new to the champion, it is worse than the champion in accuracy" in found.reason
    gate = GateResult("accuracy[new].low > champion - 0.05", "", "", passed=False)
    assert on_new((-0.2, -0.3, -0.1), (gate,)).word == "worse"


def test_a_model_that_is_clearly_worse_on_new_rows_than_on_others_is_said_so_and_a_failed_gate_there_makes_it_worse():
    said = on_new((0.0, -0.1, 0.1), old=LOWER)
    assert said.word == "better"
    assert "On 60 new test rows it is clearly worse than on the others: accuracy 0.4000 against 0.8000." in said.reason
    gate = GateResult("accuracy[new] >= 0.6", "", "", passed=False)
    failed = on_new((0.0, -0.1, 0.1), (gate,), LOWER)
    assert (failed.word, "Not passed on new rows: accuracy[new] >= 0.6." in failed.reason) == ("mixed", True)
    equal = on_new((0.0, -0.1, 0.1), (gate,), LOWER, overall=(0.0, -0.1, 0.1))
    assert equal.word == "worse"
    assert equal.reason.startswith("On 60 new test rows it is clearly worse than on the others")
    assert on_new((0.0, -0.1, 0.1), (gate,)).word == "inconclusive"
    idle = replace(gate, passed=True, applies=False)
    assert on_new((0.0, -0.1, 0.1), (idle,)).word == "better"


GAIN = {"rougeL": Difference(0.1, 0.05, 0.15, 0.001, 100)}


def test_a_gain_is_inconclusive_if_answers_are_still_nonsense():
    scores = {"rougeL": 0.139, "exact_match": 0.0, "loss": 1.2}
    found = verdict(Evaluation({"rougeL": 0.039}, scores, GAIN, (), 100))
    assert found.word == "inconclusive"
    assert "little in common with their references (rougeL 0.139, exact_match 0)" in found.reason
    assert verdict(Evaluation({"rougeL": 0.83}, {**scores, "rougeL": 0.93}, GAIN, (), 100)).word == "better"


def test_a_gain_on_rows_that_were_trained_on_may_be_memory():
    overlap = Contamination(100, 900, 12, 0, 0, 0, 0, 12, 0, {}, (), ())
    found = verdict(Evaluation({"rougeL": 0.5}, {"rougeL": 0.6}, GAIN, (), 100, contamination=overlap))
    assert found.word == "inconclusive"
    assert "12% of the test rows overlap with training rows" in found.reason


def test_a_small_gain_is_called_small():
    change = {"accuracy": Difference(0.005, 0.002, 0.008, 0.001, 5000)}
    found = verdict(Evaluation({"accuracy": 0.8}, {"accuracy": 0.805}, change, (), 5000))
    assert (found.word, "The gain is small: 0.6%" in found.reason) == ("better", True)


@pytest.mark.parametrize(
    ("losses", "validations", "falling"),
    [
        ([3.0] * 8, [1.0, 0.5], True),
        ([3.0] * 8, [1.0, 0.99], False),
        ([3.0] * 8, [0.4, 1.0, 0.5], False),
        ([4, 3.5, 3, 2.5, 2.0, 1.9, 1.5, 1.4], [1.0], True),
        ([4, 3.5, 2.0, 2.0, 2.0, 2.0, 1.99, 2.0], [], False),
        ([4, 1], [], False),
        ([5.0, 0.5, 0.1, 0.04], [0.0004, 0.0003], False),
    ],
)
def test_a_loss_still_falling_at_the_end_is_mentioned(losses, validations, falling):
    curve = [{"loss": loss} for loss in losses] + [{"validation_loss": loss} for loss in validations]
    assert still_falling(curve) is falling
    evaluation = Evaluation({"rougeL": 0.5}, {"rougeL": 0.6}, GAIN, (), 100)
    assert ("still falling" in verdict(evaluation, None, curve).reason) is falling


def scored(loss: float, match: float, **others: float) -> Evaluation:
    change = Difference(match - 0.1, match - 0.15, match - 0.05, 0.001, 100)
    tuned = {"loss": loss, "exact_match": match, **others}
    return Evaluation({"loss": 3.0, "exact_match": 0.1}, tuned, {"exact_match": change}, (), 100)


def challenged(*outcomes: bool | None, gates: tuple[str, ...], notes: str = "", **ends: tuple[float, float]) -> Verdict:
    """Return the verdict of a tuned model that beats its base and differs from its champion by `ends`."""
    change = {name: Difference(sum(pair) / 2, *pair, 0.5 if pair == OPEN else 0.001, 48) for name, pair in ends.items()}
    champion = Champion("runs/best", {}, change, {}, rows=48)
    results = [GateResult(gate, "", "", passed, notes) for gate, passed in zip(gates, outcomes, strict=True)]
    evaluation = Evaluation({"rougeL": 0.5}, {"rougeL": 0.6}, GAIN, (), 60, champion=champion)
    return verdict(evaluation, gates=results)


MARGIN = ("accuracy.low > champion - 0.1",)
SMALL_LOSS = (-0.04, -0.01)


@pytest.mark.parametrize(
    ("outcome", "ends", "word", "reason"),
    [
        (True, {"accuracy": BETTER}, "better", "Better in accuracy than the champion. No metric got worse."),
        (True, {"accuracy": OPEN}, "within margin", "Accuracy is within the margin of the gate."),
        (True, {"accuracy": SMALL_LOSS}, "within margin", "Accuracy is worse, but within the margin of the gate."),
        (False, {"accuracy": WORSE}, "worse", "Worse in accuracy than the champion; no metric got better."),
        (False, {"accuracy": WORSE, "loss": LESS}, "worse", "Better in loss than the champion, worse in accuracy."),
        (None, {"accuracy": OPEN}, "inconclusive", "No metric shows a clear difference from the champion."),
        (None, {"accuracy": OPEN, "loss": LESS}, "inconclusive", "Better in loss than the champion."),
        (True, {"accuracy": OPEN, "loss": LESS}, "better", "Better in loss than the champion. Accuracy is within"),
        (True, {"accuracy": OPEN, "loss": MORE}, "mixed", "Worse in loss than the champion. Accuracy is within"),
    ],
)
def test_with_a_champion_the_verdict_is_about_the_champion_and_agrees_with_the_gate(outcome, ends, word, reason):
    found = challenged(outcome, gates=MARGIN, **ends)
    assert found.word == word
    assert found.reason.startswith(reason)
    assert found.reason.endswith("Compared on 48 test rows.")


def test_a_gate_that_did_not_pass_prevents_a_good_verdict():
    counted = challenged(True, gates=MARGIN, notes="inconclusive: too few rows", accuracy=OPEN)
    assert counted.word == "inconclusive", "when_unsure: pass"
    scores = challenged(True, False, gates=(*MARGIN, "loss <= champion"), accuracy=BETTER)
    assert (scores.word, "loss <= champion" in scores.reason) == ("inconclusive", True)


def test_a_gate_on_the_better_end_of_an_interval_shows_no_margin():
    assert challenged(True, gates=("accuracy.high >= champion",), accuracy=OPEN).word == "inconclusive"


def test_a_champion_without_common_metrics_is_inconclusive_whatever_the_base_says():
    found = challenged(gates=())
    assert (found.word, found.reason) == ("inconclusive", "No metric could be compared with the champion.")


def test_a_metric_with_a_gate_on_its_interval_needs_no_correction_for_the_others():
    others = dict.fromkeys(["rouge1", "rouge2", "rougeL", "chrf"], Difference(0.1, *OPEN, 0.6, 80))
    moved = Evaluation({}, {}, {**others, "exact_match": Difference(0.1, *BETTER, 0.03, 80)}, (), 80)
    assert verdict(moved).word == "inconclusive"
    gate = GateResult("exact_match.low > base", "", "", passed=True)
    assert verdict(moved, gates=[gate]).reason.startswith("Better in exact match.")


def test_a_metric_that_guessing_improves_too_does_not_count():
    change = differences(f1_macro=BETTER, accuracy=OPEN)
    evaluation = Evaluation({}, {}, change, (), 100, baseline="the most frequent class")
    assert verdict(evaluation).word == "better"
    found = verdict(replace(evaluation, guessable=("f1_macro",)))
    assert found.word == "inconclusive"
    assert found.reason.endswith(
        "F1 macro does not count: guessing by class frequency beats the most frequent class there too."
    )


def test_mean_deviation_and_range_match_the_scores() -> None:
    scores = [0.3, 0.5, 0.1]
    found = spread("exact_match", scores, 0.05)
    assert found.mean == pytest.approx(sum(scores) / 3)
    assert found.deviation == pytest.approx(statistics.stdev(scores))
    assert (found.lowest, found.highest, found.spread) == (0.1, 0.5, pytest.approx(0.4))
    assert found.gain == pytest.approx(0.25)
    assert (found.larger, found.better) == (False, True)


@pytest.mark.parametrize(
    ("metric", "scores", "base", "larger", "better"),
    [
        ("loss", [1.0, 1.1], 3.0, True, True),
        ("loss", [3.4, 3.5], 3.0, True, False),
        ("accuracy", [0.4, 0.5], 0.4, False, True),
        ("length_ratio", [1.0, 1.1], 3.0, None, False),
        ("loss", [1.0, math.nan], 3.0, None, None),
        ("mine", [1e308, 1e308], 3.0, None, None),
        ("loss", [1.0, 1.1], None, None, None),
        ("loss", [1.0], 3.0, None, None),
    ],
)
def test_a_gain_is_compared_with_the_spread_if_both_exist(
    metric: str, scores: list[float], base: float | None, larger: bool | None, better: bool | None
) -> None:
    found = spread(metric, scores, base)
    assert (found.larger, found.better) == (larger, better)


def test_the_report_has_each_seed_and_the_missing_seeds() -> None:
    found = describe_spread({7: scored(1.0, 0.5, rougeL=0.2), 8: scored(1.2, 0.6), 9: scored(0.9, 0.55)}, [10])
    assert [run.seed for run in found.runs] == [7, 8, 9]
    assert found.runs[1].tuned == {"loss": 1.2, "exact_match": 0.6}
    assert found.runs[1].interval["exact_match"] == (pytest.approx(0.45), pytest.approx(0.55))
    assert found.metrics["loss"].scores == [1.0, 1.2, 0.9]
    assert "rougeL" not in found.metrics, "not every seed has it"
    assert found.missing == [10]
    assert found.told.endswith("No scores yet: seed 10.")


def judged(**metrics: tuple[bool | None, bool]) -> dict[str, Spread]:
    return {name: Spread((), None, larger=larger, better=better) for name, (larger, better) in metrics.items()}


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (judged(loss=(True, True)), "The gain over the base is larger than the spread between 3 seeds in loss."),
        (judged(loss=(False, True)), "The gain over the base is not larger than the spread between 3 seeds in loss."),
        (
            judged(loss=(True, True), f1=(False, True), wer=(True, False)),
            "The gain over the base is larger than the spread between 3 seeds in loss; it is not in f1; "
            "the tuned model is worse than the base by more than that spread in wer.",
        ),
        (
            judged(wer=(True, False)),
            "The tuned model is worse than the base by more than the spread between 3 seeds in wer.",
        ),
        (
            judged(kl=(True, False), loss=(None, True)),
            "The spread is unknown, so the gain over the base cannot be compared with it.",
        ),
    ],
)
def test_a_sentence_compares_the_gain_with_the_spread(metrics: dict[str, Spread], told: str) -> None:
    assert describe_gain(metrics, 3, []) == told


def test_the_verdict_mentions_only_gains_within_the_spread() -> None:
    runs = [SeedRun(seed, {}, {}) for seed in (1, 2, 3)]
    within, beyond = (Seeds(runs, (), judged(exact_match=(larger, True)), "") for larger in (False, True))
    found = verdict(scored(1.0, 0.5), within)
    assert found.word == "better"
    assert "the spread of 3 seeds is at least as large as the gain" in found.reason
    assert "seed" not in verdict(scored(1.0, 0.5), beyond).reason
    assert warn_of_spread(None, ["accuracy"]) == ""
    assert warn_of_spread(within, ["loss"]) == ""
