"""The report's sections on decisions and calibration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmtune.display.blocks import Beside, Html, Page, Section, Table, Text
from llmtune.display.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH
from llmtune.records import Difference
from llmtune.report.confidence_sections import calibration_section, decision_section
from llmtune.report.render_html import render_html_section
from llmtune.report.render_markdown import to_markdown
from llmtune.store.score_records import Calibration, Decided, Decision, Evaluation, Reliability, Threshold

THRESHOLD = Threshold(0.05, 0.95, 0.9, 400, 300, 8)
RULES = Decision(("red", "green"), False, 400, 1, THRESHOLD, (0.2, 0.2), 0.9, False, (), -1.0, 0.05)
CURVE = ((0.5, 0.01), (0.75, 0.03), (1.0, 0.1))
BINS = ((0.5, 0.25, 4.0), (1.0, 1.0, 16.0))
SCORES = {"ece": 0.1, "brier": 0.2, "nll": 0.3}
RECORD = Calibration(1.5, ("red", "green"), False, 40, SCORES, SCORES)
CHANGE = Difference(-0.02, -0.03, -0.01, 0.001, 20)
FOUND = Reliability(RECORD, "", SCORES, {**SCORES, "ece": 0.08}, {"ece": CHANGE}, BINS, BINS[:1])


def show(record: Decision | None, why: str = "") -> Section:
    own = {"decided": Difference(0.75, 0.7, 0.8, 1, 200), "decided_error": Difference(0.03, 0.01, 0.07, 1, 150)}
    evaluation = Evaluation({}, {"decided": 0.75}, {}, (), 200, intervals=own)
    return decision_section(replace(evaluation, decided=Decided(record, why, CURVE if record else ())))


def texts(section: Section) -> str:
    return " ".join(block.text for block in section.blocks if isinstance(block, Text))


def test_scores_are_next_to_a_plot_of_risk_and_coverage() -> None:
    section = show(RULES)
    (both,) = (block for block in section.blocks if isinstance(block, Beside))
    (table,), (plot,) = both.left, both.right
    assert isinstance(table, Table)
    assert isinstance(plot, Html)
    assert [row[0].text for row in table.cells] == ["decided", "decided_error"]
    assert table.cells[1][2].text == "0.0100 to 0.0700"
    assert "0.7500 are decided" in plot.markup


def test_the_text_states_risk_confidence_and_what_is_not_guaranteed() -> None:
    text = texts(show(RULES))
    assert "At most 5 % of the decided answers are wrong, with 95 % confidence" in text
    assert "of 400 validation rows, 300 are decided, and 8 of these are wrong" in text
    assert "A prediction set has the right label in 90 % of the rows (split conformal prediction)." in text
    assert "Not guaranteed: that rows of another kind have low scores." in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": replace(THRESHOLD, value=None)}, "So every answer asks a person."),
        ({"checkpoints": 5}, "whichever of 5 checkpoints was best on the same rows"),
        ({"many": True}, "conformal risk control of the false negative rate"),
        ({"per_class": True, "free_labels": ("green",)}, "Always in the set, for lack of validation rows: green."),
        ({"lowest_score": None}, "too few to call any"),
        ({"outside": 9}, "9 of 400 validation rows have a reference that is none of the choices. They count as errors"),
        ({"outside": 90, "free_labels": ("red", "green")}, "No set can reach this: 90 of 400 validation rows have"),
        (
            {"outside": 9, "free_labels": ("red", "green")},
            "Always in the set, for lack of validation rows: red, green.",
        ),
    ],
)
def test_the_text_states_exceptions(changes: dict[str, object], words: str) -> None:
    assert words in texts(show(replace(RULES, **changes)))


def test_a_run_without_decisions_says_why_or_nothing() -> None:
    assert texts(show(None, "no validation row has a choice")) == "No decisions: no validation row has a choice."
    assert decision_section(Evaluation({}, {}, {}, (), 0)).blocks == []


def section_of(found: Reliability | None) -> Section:
    return calibration_section(Evaluation({}, {}, {}, (), 20, reliability=found))


def test_the_plot_puts_each_bin_at_its_probability_and_share() -> None:
    page = str(render_html_section(section_of(FOUND)))
    wide, tall = WIDTH - LEFT - RIGHT, 300 - TOP - BOTTOM
    assert f'cx="{LEFT + wide / 2:.1f}" cy="{TOP + tall * 0.75:.1f}" r="6.5"' in page  # a quarter of the area
    assert f'cx="{LEFT + wide:.1f}" cy="{TOP:.1f}" r="11.0"' in page
    assert page.count("<circle") == 3 + 1  # one is the interval's
    assert "0.50: 25 % of 4 right" in page


def test_the_scores_before_and_after_are_in_every_form() -> None:
    text = to_markdown(Page("run", [section_of(FOUND)]))
    assert "The temperature is 1.500, fitted on 40 validation rows." in text
    assert "0.1000" in text
    assert "−0.0300 to −0.0100" in text


def test_without_a_temperature_the_reason_and_the_test_rows_are_shown() -> None:
    section = section_of(Reliability(None, "a temperature needs 20 validation rows", SCORES, bins_before=BINS))
    assert Text("Not calibrated: a temperature needs 20 validation rows.", "note") in section.blocks
    (beside,) = (block for block in section.blocks if isinstance(block, Beside))
    assert [type(block) for block in beside.left] == [Html]
    assert beside.right == []
    assert section_of(None).blocks == []


def test_validation_rows_without_a_right_choice_are_counted() -> None:
    counted = replace(FOUND, record=replace(RECORD, outside=7))
    text = to_markdown(Page("run", [section_of(counted)]))
    assert "7 of 40 validation rows have a reference that is none of the choices. No choice is right for them." in text
    assert "none of the choices" not in to_markdown(Page("run", [section_of(FOUND)]))
