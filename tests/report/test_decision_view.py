"""The report's section on decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmtune.display.blocks import Beside, Html, Section, Table, Text
from llmtune.records import Difference
from llmtune.report.decision_view import decision_section
from llmtune.store.score_records import Decided, Decision, Evaluation, Threshold

THRESHOLD = Threshold(0.05, 0.95, 0.9, 400, 300, 8)
RULES = Decision(("red", "green"), False, 400, 1, THRESHOLD, (0.2, 0.2), 0.9, False, (), -1.0, 0.05)
CURVE = ((0.5, 0.01), (0.75, 0.03), (1.0, 0.1))


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
