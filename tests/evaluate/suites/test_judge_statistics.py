import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from llmtune.evaluate.intervals import exact_interval
from llmtune.evaluate.suites.judge_statistics import JudgedPairs, fit_correction, measure_judge, win_rate


def draw_pairs(generator, count, win, tie=0.1, longer=0.5, position=0.0, length=0.0, error=0.0, apart=False):
    """Judged pairs of a judge with known biases; `apart` draws its mistakes in each order anew.

    People prefer the first answer in a share `win`, and none in `tie`; it is longer in a share `longer`. In a share
    `position` of cases the judge picks the answer shown first, in a share `length` the longer one; else it errs in a
    share `error`.
    """
    people_N = generator.choice([1.0, 0.0, -1.0], count, p=[win, tie, 1 - win - tie])
    longer_N = np.where(generator.random(count) < longer, 1.0, -1.0)

    def verdict(first, mode_N, right_N):
        return np.where(mode_N < position, first, np.where(mode_N < position + length, longer_N, people_N * right_N))

    draws = [(generator.random(count), np.where(generator.random(count) < error, -1, 1)) for _ in range(2)]
    return JudgedPairs(verdict(1.0, *draws[0]), verdict(-1.0, *draws[apart]), longer_N, people_N)


BIASED = {"position": 0.2, "length": 0.15, "error": 0.1}
CASES = {
    "errors": {"test": {"win": 0.55}, "judge": {"error": 0.15}},
    "position": {"test": {"win": 0.55}, "judge": {"position": 0.3, "error": 0.1}},
    "length": {"test": {"win": 0.45, "longer": 0.85}, "judge": {"length": 0.2, "error": 0.05}},
    "all three": {"test": {"win": 0.6, "longer": 0.8}, "judge": BIASED},
    "all three, anew in each order": {"test": {"win": 0.35, "longer": 0.7}, "judge": {**BIASED, "apart": True}},
    "right": {"test": {"win": 0.6}, "judge": {}},
    "a clear winner": {"test": {"win": 0.9, "tie": 0.05}, "judge": {"error": 0.05}},
}


def cover(test, judge, rows, labelled, runs=500):
    """The shares of runs whose interval covers the truth: corrected, and as the judge says."""
    generator, truth = np.random.default_rng(1), test["win"] + test.get("tie", 0.1) / 2
    hits = np.zeros(2)
    for _ in range(runs):
        judged = draw_pairs(generator, rows, **test, **judge)
        people = draw_pairs(generator, labelled, 0.45, **judge)
        for number, change in enumerate((win_rate(judged, people), win_rate(judged))):
            hits[number] += (1 + change.low) / 2 <= truth <= (1 + change.high) / 2
    return hits / runs


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "labelled"), [(50, 30), (200, 100), (1000, 300)])
@pytest.mark.parametrize("case", CASES)
def test_the_corrected_win_rate_covers_the_truth_in_95_of_100_runs(case, rows, labelled):
    """500 runs have a standard error of 0.01."""
    assert cover(**CASES[case], rows=rows, labelled=labelled)[0] >= 0.925


@pytest.mark.slow
@pytest.mark.promise(
    "metric", "own interval", equal="the truth, beyond an end in 5 of 100 runs", place="judge.win_rate"
)
@pytest.mark.parametrize("rows", [2, 5, 8, 20, 60])
@pytest.mark.parametrize("case", ["right", "a clear winner", "errors"])
def test_an_end_of_the_corrected_win_rate_errs_in_at_most_5_of_100_runs(case, rows):
    test, judge = CASES[case]["test"], CASES[case]["judge"]
    generator, truth, runs, errors = np.random.default_rng(rows), test["win"] + test.get("tie", 0.1) / 2, 300, [0, 0]
    for _ in range(runs):
        labelled = draw_pairs(generator, 60, 0.45, **judge)
        change = win_rate(draw_pairs(generator, rows, **test, **judge), labelled)
        errors[0] += (1 + change.low) / 2 > truth + 1e-9
        errors[1] += (1 + change.high) / 2 < truth - 1e-9
    assert max(exact_interval(count, runs, 0.05)[0] for count in errors) <= 0.05, errors


@pytest.mark.parametrize("case", CASES)
def test_the_corrected_win_rate_covers_the_truth(case):
    """150 runs have a standard error of 0.018."""
    assert cover(**CASES[case], rows=100, labelled=60, runs=150)[0] >= 0.9


def test_the_uncorrected_win_rate_misses_the_truth_if_the_judge_errs():
    for case, most in (("length", 0.3), ("errors", 0.8)):
        _, uncorrected = cover(**CASES[case], rows=400, labelled=20, runs=100)
        assert uncorrected < most


@pytest.mark.parametrize("rows", [8, 50, 1000])
def test_a_judge_that_always_picks_the_first_answer_knows_nothing(rows):
    always = JudgedPairs(np.ones(rows), -np.ones(rows), np.zeros(rows))
    change = win_rate(always)
    assert (change.value, change.p) == (0, 1)
    assert change.low < -0.5 if rows == 8 else change.low < -0.85
    assert change.high == pytest.approx(-change.low)
    assert measure_judge(always, 0)["inconsistent"].value == 1
    turned = win_rate(replace(always, shown_first_N=-np.ones(rows), shown_second_N=np.ones(rows)))
    assert (turned.low, turned.high) == (change.low, change.high)


def test_contradictions_widen_the_interval_by_their_share():
    rows = 400
    for share in (0, 40, 120):
        first = np.array([1.0] * 260 + [-1.0] * (140 - share) + [1.0] * share)
        second = np.array([1.0] * 260 + [-1.0] * (140 - share) + [-1.0] * share)
        change = win_rate(JudgedPairs(first, second, np.zeros(rows)))
        sure = win_rate(JudgedPairs(first, first, np.zeros(rows)))
        lost = win_rate(JudgedPairs(second, second, np.zeros(rows)))
        assert change.low == pytest.approx(lost.low)
        assert change.high == pytest.approx(sure.high)
        assert change.high - change.low > 2 * share / rows
        assert change.p == pytest.approx(lost.p)


def test_an_interval_with_contradictions_covers_the_truth_whatever_the_position_costs():
    for position in (0.1, 0.3, 0.6, 1.0):
        covered = cover({"win": 0.6, "tie": 0.0}, {"position": position}, rows=100, labelled=20, runs=60)[1]
        assert covered >= 0.9


def test_a_gate_on_a_tie_between_the_models_does_not_pass_with_a_judge_that_guesses():
    """A judge that answers by coin in each order: a margin of 0.05 below a tie is never shown."""
    generator, passed = np.random.default_rng(9), 0
    for _ in range(100):
        first, second = (generator.choice([1.0, -1.0], 200) for _ in range(2))
        passed += (1 + win_rate(JudgedPairs(first, second, np.zeros(200))).low) / 2 > 0.45
    assert passed == 0


def test_a_correction_that_ignores_length_misses_the_truth():
    """The proof that length has to be in it: labelled pairs of equal length show errors, and hide the bias."""
    generator, hits = np.random.default_rng(2), 0
    for _ in range(100):
        judged = draw_pairs(generator, 400, 0.45, longer=0.95, length=0.25)
        people = draw_pairs(generator, 300, 0.45, length=0.25)
        blind = replace(people, longer_N=np.zeros(300))
        hits += win_rate(judged, blind).low <= 0 <= win_rate(judged, blind).high
    assert hits < 20


@pytest.mark.parametrize("labelled", [10, 100])
def test_a_judge_at_chance_cannot_tell(labelled):
    generator = np.random.default_rng(3)
    everything = 0
    for _ in range(100):
        judged = draw_pairs(generator, 300, 0.8, error=0.5)
        people = draw_pairs(generator, labelled, 0.45, error=0.5)
        change = win_rate(judged, people)
        everything += (change.low, change.high, change.p) == (-1, 1, 1)
        assert fit_correction(people).is_informative() or (change.low, change.high) == (-1, 1)
    assert everything >= 90


def test_a_judge_that_contradicts_people_is_not_turned_around():
    generator = np.random.default_rng(4)
    change = win_rate(draw_pairs(generator, 300, 0.8), draw_pairs(generator, 100, 0.5, error=0.9))
    assert (change.low, change.high) == (-1, 1)


def test_naming_the_answers_the_other_way_round_turns_the_win_rate_around():
    generator = np.random.default_rng(5)
    judged, people = (draw_pairs(generator, 80, 0.6, longer=0.7, **BIASED) for _ in range(2))
    turned = JudgedPairs(-judged.shown_first_N, -judged.shown_second_N, -judged.longer_N)
    one, other = win_rate(judged, people), win_rate(turned, people)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low))
    assert other.p == pytest.approx(one.p)


def test_without_labelled_pairs_the_judge_is_taken_at_its_word():
    verdicts = np.array([1.0] * 60 + [-1.0] * 30 + [0.0] * 10)
    change = win_rate(JudgedPairs(verdicts, verdicts, np.ones(100)))
    assert change.value == pytest.approx(0.3)
    assert change.low < 0.3 < change.high
    assert change.low > 0
    assert change.n == 100
    contradictory = win_rate(JudgedPairs(verdicts, -verdicts, np.ones(100)))
    assert contradictory.value == 0
    assert contradictory.low < 0 < contradictory.high


def test_pairs_that_belong_together_count_once():
    generator = np.random.default_rng(6)
    judged = draw_pairs(generator, 40, 0.6)
    parts = {name: np.tile(getattr(judged, name), 5) for name in ("shown_first_N", "shown_second_N", "longer_N")}
    fivefold = JudgedPairs(**parts, clusters=list(range(40)) * 5)
    change, grouped, blind = win_rate(judged), win_rate(fivefold), win_rate(replace(fivefold, clusters=()))
    assert grouped.value == pytest.approx(change.value)
    assert (grouped.n, grouped.groups) == (200, 40)
    assert grouped.high - grouped.low == pytest.approx(change.high - change.low, rel=0.1)
    assert blind.high - blind.low < 0.6 * (grouped.high - grouped.low)
    assert measure_judge(fivefold, 0)["ties"].groups == 40


def test_one_pair_gives_no_interval():
    one = JudgedPairs(np.ones(1), np.ones(1), np.ones(1), np.ones(1))
    assert (win_rate(one).low, win_rate(one).high) == (-1, 1)
    assert all(math.isnan(change.low) for change in measure_judge(one, 0).values())


# The judge's own measures


def test_measured_biases_are_within_their_intervals():
    known = {  # people have no preference in a share of 0.1
        "inconsistent": 0.2,
        "first_position": (0.2 + (0.15 + 0.65 * 0.9) / 2) / (0.2 + 0.15 + 0.65 * 0.9),
        "length_bias": 0.15,
        "error_rate": (0.65 * 0.1 + 0.15 * 0.5) / 0.8,
        "ties": 0.65 * 0.1,
        "agreement": 0.9 * (0.65 * 0.9 + 0.15 / 2) + 0.1 * (0.65 + 0.2),
    }
    generator, hits, runs = np.random.default_rng(7), dict.fromkeys(known, 0), 40
    for _ in range(runs):
        found = measure_judge(draw_pairs(generator, 200, 0.45, **BIASED), 0)
        for name, value in known.items():
            hits[name] += found[name].low <= value <= found[name].high
    assert {name: share for name, share in hits.items() if share < 0.85 * runs} == {}


def test_kappa_equals_that_of_scikit_learn():
    people = draw_pairs(np.random.default_rng(8), 150, 0.5, tie=0.2, **BIASED)
    found = measure_judge(people, 0)["kappa"]
    assert found.value == pytest.approx(cohen_kappa_score(people.verdict_N, people.people_N))
    assert found.low < found.value < found.high
    alike = replace(people, people_N=people.verdict_N)
    assert measure_judge(alike, 0)["kappa"].value == 1
    assert measure_judge(alike, 0)["kappa"].low < 1


def test_agreement_on_ten_pairs_is_not_certain():
    right = np.array([1.0, -1.0] * 5)
    people = JudgedPairs(right, right, np.ones(10), right)
    assert measure_judge(people, 0)["agreement"].low < 0.85
    assert win_rate(JudgedPairs(np.ones(50), np.ones(50), np.ones(50)), people).low < 0.95


def test_labelled_pairs_in_which_people_always_prefer_the_longer_answer_separate_nothing():
    right = np.array([1.0, -1.0] * 20)
    people = JudgedPairs(right, right, right, right)
    change = win_rate(JudgedPairs(np.ones(50), np.ones(50), np.ones(50)), people)
    assert (change.low, change.high) == (-1, 1)
