"""What the controls with other pictures make of a verdict."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from llmtune.display.console import print_sections
from llmtune.evaluate.control_verdict import find_reliance
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.verdict import judge_run
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.records import Difference
from llmtune.report.control_sections import control_section
from llmtune.store.score_records import Champion, Control, Evaluation, Slice

UP, LEVEL, DOWN = (0.4, 0.2, 0.6), (0.0, -0.1, 0.1), (-0.4, -0.6, -0.2)
UNCLEAR, CLEAR = (0.31, -0.06, 0.62), (0.75, 0.34, 0.93)  # with four answers, a guess is often right
NOWHERE = "Answers do not depend on the picture, as far as these rows show"
ANY = "Answers depend on a picture being there, not on which"
WRONG_ONLY = "The picture is not shown to help; only another row's picture makes answers worse"


def change(ends, rows=100):
    value, low, high = ends
    return Difference(value, low, high, 0.5 if low < 0 < high else 1e-6, rows)


def control(ends, rows=100, **others):
    """A control from which exact match differs by `ends`; the tuned model's own score is 0.9, the base's 0.1."""
    own = Slice("own pictures", 0, {"exact_match": 0.1}, {"exact_match": 0.9}, {"exact_match": change(UP, rows)})
    changes = {"exact_match": change(ends, rows)} | {name: change(one, rows) for name, one in others.items()}
    tuned = {name: 0.9 - one.value for name, one in changes.items()}
    scores = replace(own, tuned={**own.tuned, **dict.fromkeys(others, 0.9)})
    return Control({"exact_match": 0.1}, tuned, changes, {"exact_match": change(LEVEL, rows)}, scores, rows)


def evaluation(blind, swapped, *, rows=100, pictured=100, gain=UP):
    controls = {"blind": blind, "swapped": swapped}
    scores = {"exact_match": 0.1}, {"exact_match": 0.9}, {"exact_match": change(gain)}
    made = {name: one for name, one in controls.items() if one}
    return Evaluation(*scores, (), rows, controls=made, pictured=pictured)


@pytest.mark.parametrize(
    ("blind", "swapped", "word", "sentence"),
    [
        (UP, UP, "better", "With a grey picture, 50% of the gain in exact match remains."),
        (LEVEL, LEVEL, "inconclusive", f"{NOWHERE}: exact match is 0.9000 with its own, 0.9000 with a grey picture"),
        (DOWN, DOWN, "inconclusive", NOWHERE),
        (UP, LEVEL, "inconclusive", ANY),
        (LEVEL, UP, "inconclusive", WRONG_ONLY),
        (UNCLEAR, CLEAR, "better", "With a grey picture, 61% of the gain in exact match remains."),
        (UNCLEAR, UNCLEAR, "inconclusive", NOWHERE),
        (CLEAR, UNCLEAR, "inconclusive", ANY),
    ],
)
def test_a_gain_that_a_control_has_too_is_not_better_and_the_verdict_says_so(blind, swapped, word, sentence):
    found = judge_run(evaluation(control(blind), control(swapped)), (), 0.05)
    assert found.word == word
    assert sentence in found.reason
    assert found.reason.startswith("Better in exact match.")  # the base is beaten all the same


def test_a_gain_over_the_champion_is_weighed_too():
    champion = Champion("runs/best", {"exact_match": 0.1}, {"exact_match": change(UP)}, {}, {"exact_match": 0.9}, 100)
    found = judge_run(replace(evaluation(control(LEVEL), control(LEVEL)), champion=champion), (), 0.05)
    assert found.word == "inconclusive"
    assert NOWHERE in found.reason


def test_answers_decide_and_not_the_loss_which_any_input_changes():
    loss = {"loss": (-0.1, -0.15, -0.05)}
    found = judge_run(evaluation(control(LEVEL, **loss), control(LEVEL)), (), 0.05)
    assert (found.word, NOWHERE in found.reason) == ("inconclusive", True)
    only = control(LEVEL, **loss)
    only = replace(only, difference={"loss": only.difference["loss"]}, tuned={"loss": 1.0})
    reliance = find_reliance(evaluation(only, None))
    assert reliance is not None
    assert reliance.sentence == ""


def test_few_pictures_among_texts_are_named_and_do_not_take_the_word_away():
    found = judge_run(evaluation(control(LEVEL), control(LEVEL), pictured=20), (), 0.05)
    assert (found.word, NOWHERE in found.reason) == ("better", True)


@pytest.mark.parametrize(
    ("blind", "why"), [(None, "evaluate.controls is off"), (control(LEVEL, rows=9), "too few test rows have one")]
)
def test_an_unknown_reliance_is_said(blind, why):
    found = judge_run(evaluation(blind, None), (), 0.05)
    assert f"Whether answers depend on the picture is unknown: {why}." in found.reason


def test_a_worse_model_stays_worse():
    found = judge_run(evaluation(control(LEVEL), control(LEVEL), gain=DOWN), (), 0.05)
    assert (found.word, NOWHERE in found.reason) == ("worse", True)


def test_without_pictures_nothing_is_said():
    found = judge_run(evaluation(None, None, pictured=0), (), 0.05)
    assert (found.word, "picture" in found.reason) == ("better", False)


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ("exact_match.low > blind", True),
        ("exact_match.low > blind + 0.3", False),
        ("exact_match > blind", True),
        ("exact_match > blind * 2", False),
        ("exact_match.low > swapped", False),
        ("exact_match.low > swapped - 0.2", True),
        ("rougeL.low > swapped", False),
    ],
)
def test_gates_compare_the_model_with_itself_under_a_control(gate, passed):
    (found,) = check_gates(EvaluateSection(gates=(gate,)), evaluation(control(UP), control(LEVEL)))
    assert found.passed is passed
    assert "not measured" not in found.got or gate.startswith("rougeL")


def test_the_section_shows_both_models_with_every_picture():
    shown = evaluation(control(UP), replace(control(LEVEL), note="3 rows are left out"))
    console = Console(file=io.StringIO(), width=200)
    print_sections([control_section(shown, "chat")], console)
    text = console.file.getvalue()
    for part in ("own picture", "grey picture", "another row's", "+0.4000", "3 rows are left out", "0.9000", "0.1000"):
        assert part in text
    off = control_section(evaluation(None, None), "chat")
    assert "evaluate.controls" in off.blocks[0].text
