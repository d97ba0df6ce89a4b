import math
from dataclasses import replace

import pytest

from llmtune.errors import GateFailed, GateUnsure, RecipeError
from llmtune.evaluate.gates import check_gates, require_gates, suggest_step
from llmtune.evaluate.significance import ALL_CHANCE, ALL_TIES
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.records import Difference
from llmtune.store.score_records import Champion, Evaluation, GateResult, SimpleBaseline, Study

EVALUATION = Evaluation(
    base={"exact_match": 0.5, "loss": 2.0, "chrf": 40.0},
    tuned={"exact_match": 0.8, "loss": 1.5, "chrf": math.nan},
    difference={
        "exact_match": Difference(0.3, 0.1, 0.4, 0.001, 100, other=(0.4, 0.6)),
        "loss": Difference(-0.5, -0.7, -0.3, 0.001, 100),
        "chrf": Difference(math.nan, math.nan, math.nan, 1, 100),
    },
    samples=(),
    rows=100,
    intervals={"exact_match": Difference(0.8, 0.71, 0.87, 1, 100), "loss": Difference(1.5, 1.3, 1.8, 1, 100)},
    champion=Champion(
        "runs/best",
        {"exact_match": 0.79},
        {"exact_match": Difference(0.01, -0.02, 0.04, 0.5, 100, other=(0.7, 0.86))},
        {"loss": "counted in other units per row"},
    ),
)


def check(evaluation, *gates, **settings):
    return check_gates(EvaluateSection(gates=gates, **settings), evaluation)


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ("exact_match >= 0.8", True),
        ("exact_match > 0.8", False),
        ("exact_match == 0.8", True),
        ("exact_match > base", True),
        ("loss > base", False),
        ("loss < base - 0.4", True),
        ("loss < base - 0.6", False),
        ("loss <= base * 0.75", True),
        ("loss <= base * 0.7", False),
        ("exact_match.low > base", True),
        ("exact_match.low > base + 0.05", True),
        ("exact_match.low > base + 0.15", False),
        ("exact_match.low > base * 1.1", True),  # 10 % of 0.5 is 0.05, and the low end is 0.1
        ("exact_match.low > base * 1.3", False),
        ("exact_match.high < base + 0.5", True),
        ("loss.high < base", True),
        ("loss.high < base - 0.4", False),
        ("loss.low > base", False),
        ("exact_match.low >= 0.7", True),
        ("exact_match.low >= 0.75", False),
        ("loss.high <= 1.8", True),
        ("loss.high <= 1.2", False),
        ("chrf.low >= 0.1", False),  # no interval
        ("chrf >= 0", False),  # not a number
        ("chrf.low > base", False),
        ("rougeL > base", False),  # not measured
        ("exact_match > champion", True),
        ("exact_match > champion + 0.02", False),
        ("exact_match.low > champion - 0.03", True),
        ("exact_match.low > champion - 0.01", False),
        ("exact_match.low > champion * 0.96", True),  # 4 % of 0.79 is more than 0.03
        ("exact_match.high < champion + 0.05", True),
    ],
)
def test_a_gate_reports_whether_its_condition_holds(gate, passed):
    (found,) = check(EVALUATION, gate)
    assert found.passed is passed
    assert found.name == gate


def test_a_gate_reports_the_wanted_and_the_actual_value():
    score, low, absent = check(EVALUATION, "loss < base - 0.6", "exact_match.low > base + 0.15", "rougeL > 1")
    assert (score.wanted, score.got) == ("loss < 1.4", "1.5")
    assert (low.wanted, low.got) == ("low end of the difference > 0.15", "0.1")
    assert absent.got == "not measured: the last evaluation did not compute it"


def judged(test, low=0.0, high=1.0):
    """An evaluation with a judge's win rate."""
    change, own = Difference(0.0, -1.0, 1.0, 1.0, 60, test), Difference(0.5, low, high, 1.0, 60, test)
    study = Study("Judge", {"win_rate": 0.5}, {"win_rate": 0.5}, {"win_rate": change}, {}, {})
    return replace(EVALUATION, studies={"judge": replace(study, intervals={"win_rate": own})})


@pytest.mark.parametrize(
    "gate", ["judge.win_rate.low > 0.45", "judge.win_rate > 0.45", "judge.win_rate.low > base - 0.1"]
)
@pytest.mark.parametrize("why", [ALL_TIES, ALL_CHANCE])
def test_a_gate_on_a_judge_that_cannot_tell_is_inconclusive_whatever_the_number_of_rows(gate, why):
    (found,) = check(judged(why), gate, when_unsure="report")
    assert (found.passed, found.note) == (None, f"inconclusive: {why}, so no number of rows would decide it")
    assert "Add rows" not in suggest_step(found)
    (usual,) = check(judged("Fieller", 0.46, 0.54), "judge.win_rate.low > 0.45")
    assert usual.passed


MISSING = "not measured: no reply about 4 rows has a verdict"


@pytest.mark.parametrize(
    ("gate", "got"),
    [
        ("bleu > 1", "not measured: these rows lack its inputs"),
        ("judge.win_rate > 0.5", MISSING),
        ("judge.win_rate.low > base", MISSING),
        ("chrf > bm25", "not measured: bm25 has no chrf on these rows"),
        ("exact_match.low > blind", "not measured: no test row has a picture, or evaluate.controls was off"),
        ("seconds.low > 0.5", "no interval: these rows give none"),
        ("deploy.gguf.chrf > tuned", "not measured: `llmtune run` makes and scores the exports"),
    ],
)
def test_a_gate_that_got_nothing_says_why(gate, got):
    silent = Study("Judge", {}, {}, {}, {}, {}, {"win_rate": MISSING})
    evaluation = replace(
        EVALUATION,
        tuned={**EVALUATION.tuned, "seconds": 2.0},
        signatures={"bleu": "not measured: these rows lack its inputs"},
        studies={"judge": silent},
    )
    (found,) = check(evaluation, gate)
    assert (found.passed, found.got) == (False, got)
    assert suggest_step(found) == "Correct the cause, or change the gate."


@pytest.mark.parametrize("gate", ["chrf >= 0", "chrf.low > base", "chrf.low >= 0.1"])
def test_a_gate_on_an_undefined_score_says_so(gate):
    evaluation = replace(EVALUATION, intervals={"chrf": Difference(math.nan, math.nan, math.nan, 1, 100)})
    (found,) = check(evaluation, gate)
    assert (found.passed, found.note) == (False, "the score is undefined on these rows")


def test_more_rows_are_proposed_only_where_a_number_of_rows_would_decide_the_gate():
    at_limit = replace(EVALUATION, difference={"exact_match": Difference(0.0, -0.1, 0.1, 1, 100)})
    undecidable, undecided = (
        check(at_limit, gate, when_unsure=unsure)[0]
        for unsure in ("report", "fail")
        for gate in ("exact_match.low > base", "exact_match.low > base - 0.05")
        if (gate.endswith("base")) == (unsure == "report")
    )
    assert "no number of rows would decide it" in undecidable.note
    assert suggest_step(undecidable).startswith("More test rows do not help")
    assert (undecided.passed, suggest_step(undecided)[:8]) == (False, "Add rows")
    (failed,) = check(EVALUATION, "exact_match > 0.8")
    assert suggest_step(failed).startswith("Read the rows that it gets wrong in report.html.")


@pytest.mark.parametrize(
    ("gate", "low", "high", "passed"),
    [
        ("exact_match.low > champion - 0.05", -0.04, 0.02, True),
        ("exact_match.low > champion - 0.05", -0.06, 0.02, None),
        ("exact_match.low > champion - 0.05", -0.09, -0.06, False),
        ("exact_match.low > champion - 0.05", -0.09, -0.01, False),  # worse, and not shown to be within the margin
        ("exact_match.low > champion - 0.05", -0.04, -0.01, True),  # worse, and within it
        ("exact_match.low > champion - 0.05", -0.09, 0.0, None),
        ("exact_match.low > champion + 0.05", -0.09, -0.01, False),
        ("exact_match.low > champion + 0.05", -0.09, 0.06, None),
        ("exact_match.high < champion + 0.05", 0.01, 0.09, False),
        ("exact_match.high < champion + 0.05", 0.01, 0.04, True),
        ("exact_match.high < champion + 0.05", 0.0, 0.09, None),
        ("exact_match.low >= champion", 0.0, 0.0, True),
        ("exact_match.low > champion", 0.0, 0.0, None),  # the same answers: neither better nor worse
        ("exact_match.high < champion", -0.03, -0.01, True),
        ("exact_match.high < champion", -0.03, 0.01, None),
        ("exact_match.high < champion", 0.01, 0.03, False),
        ("exact_match.high >= champion", -0.03, 0.01, True),  # no sign that it got worse
        ("exact_match.high >= champion", -0.03, -0.01, False),
        ("exact_match.low > champion", math.nan, math.nan, None),
        ("exact_match.low == champion", -0.01, 0.01, False),
    ],
)
def test_a_gate_on_an_interval_separates_worse_from_too_few_rows(gate, low, high, passed):
    change = Difference((low + high) / 2 if low == low else 0.0, low, high, 0.5, 40)
    champion = Champion("runs/best", {"exact_match": 0.5}, {"exact_match": change}, {})
    evaluation = replace(EVALUATION, champion=champion)
    (found,) = check(evaluation, gate, when_unsure="report")
    assert found.passed is passed
    assert found.note.startswith("inconclusive: ") == (passed is None)
    for when_unsure, counted in (("fail", False), ("pass", True)):
        (again,) = check(evaluation, gate, when_unsure=when_unsure)
        assert again == replace(found, passed=counted if passed is None else passed)


@pytest.mark.parametrize(("low", "high", "noted"), [(-0.04, -0.01, True), (-0.04, 0.01, False), (0.01, 0.03, False)])
def test_a_gate_that_passes_a_worse_model_within_its_margin_says_so(low, high, noted):
    change = Difference((low + high) / 2, low, high, 0.01, 400)
    champion = Champion("runs/best", {"exact_match": 0.5}, {"exact_match": change}, {})
    (found,) = check(replace(EVALUATION, champion=champion), "exact_match.low > champion - 0.05")
    assert found.passed is True
    assert found.note == (f"worse, and shown to be within the margin: {low} to {high}" if noted else "")


def test_scores_are_compared_with_the_champion_on_shared_rows():
    champion = Champion("runs/best", {"exact_match": 0.7}, {}, {}, tuned={"exact_match": 0.6}, rows=40)
    (found,) = check(replace(EVALUATION, champion=champion), "exact_match >= champion")
    assert (found.passed, found.got, found.wanted) == (False, "0.6", "exact_match >= 0.7")


TFIDF = SimpleBaseline(
    "tfidf",
    "TF-IDF with logistic regression",
    {"exact_match": 0.7},
    {"exact_match": Difference(0.1, -0.02, 0.2, 0.1, 100)},
    {"exact_match": 0.8},
    "",
)


@pytest.mark.parametrize(
    ("gate", "passed", "wanted"),
    [
        ("exact_match > tfidf", True, "exact_match > 0.7"),
        ("exact_match >= tfidf + 0.2", False, "exact_match >= 0.9"),
        ("exact_match.low > tfidf", None, "low end of the difference from tfidf > 0"),
        ("exact_match.low > tfidf - 0.05", True, "low end of the difference from tfidf > -0.05"),
    ],
)
def test_scores_are_compared_with_a_simple_baseline(gate, passed, wanted):
    (found,) = check(replace(EVALUATION, simple_baselines={"tfidf": TFIDF}), gate, when_unsure="report")
    assert (found.passed, found.wanted) == (passed, wanted)


def test_a_gate_on_a_baseline_that_could_not_be_fitted_fails_and_says_why():
    why = "not measured: all training rows have the same label"
    (found,) = check(replace(EVALUATION, signatures={"tfidf": why}), "exact_match.low > tfidf")
    assert (found.passed, found.got) == (False, why)


def test_an_inconclusive_gate_names_the_rows_it_needs():
    margin, seen = check(
        EVALUATION, "exact_match.low > champion - 0.01", "exact_match.low > champion", when_unsure="report"
    )
    # half the interval, 0.03, is 1.98 standard errors of 100 rows; 2.8 standard errors of 0.01 take 1,797 rows
    assert margin.note == (
        "inconclusive: 100 rows are too few; about 1,797 would tell, with 80 % power, if nothing changed"
    )
    assert seen.note.endswith("about 1,797 would tell, with 80 % power, if the difference is 0.01")


def test_the_worst_gate_decides_how_a_run_ends():
    passed, failed, unsure = (GateResult("a", "a > 1", "2", outcome) for outcome in (True, False, None))
    report = {"name": "tickets"}
    require_gates([passed], report)
    with pytest.raises(GateFailed) as caught:
        require_gates([passed, unsure, failed], report)
    assert caught.value.exit_code == 6
    with pytest.raises(GateUnsure) as caught:
        require_gates([passed, unsure], report)
    assert (caught.value.exit_code, caught.value.report) == (7, report)


def test_a_gate_that_cannot_be_compared_with_the_champion_fails_and_says_why():
    left_out, unknown = check(EVALUATION, "loss.high < champion", "chrf.low > champion")
    assert (left_out.passed, left_out.got) == (False, "not comparable: counted in other units per row")
    assert (unknown.passed, unknown.got) == (False, "not measured: champion has no chrf on these rows")


def test_invalid_gates_are_refused():
    with pytest.raises(RecipeError):
        check(EVALUATION, "exact_match is good")


def test_a_gate_on_a_score_s_own_interval_is_inconclusive_in_between() -> None:
    (gate,) = check(EVALUATION, "loss.high <= 1.6", when_unsure="report")
    assert gate.passed is None
    assert gate.wanted == "high end of the interval of loss <= 1.6"
    assert "would tell, with 80 % power, if loss is 1.5" in gate.note
    (failed,) = check(EVALUATION, "loss.high <= 1.2", when_unsure="report")  # low end above: shown to be worse
    assert failed.passed is False
