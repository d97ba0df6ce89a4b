"""The report's section on calibration."""

from dataclasses import replace

from llmtune.display.blocks import Beside, Html, Page, Section, Text
from llmtune.display.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH
from llmtune.records import Difference
from llmtune.report.calibration_section import calibration_section
from llmtune.report.render_html import render_html_section
from llmtune.report.render_markdown import to_markdown
from llmtune.store.score_records import Calibration, Evaluation, Reliability

BINS = ((0.5, 0.25, 4.0), (1.0, 1.0, 16.0))
SCORES = {"ece": 0.1, "brier": 0.2, "nll": 0.3}
RECORD = Calibration(1.5, ("red", "green"), False, 40, SCORES, SCORES)
CHANGE = Difference(-0.02, -0.03, -0.01, 0.001, 20)
FOUND = Reliability(RECORD, "", SCORES, {**SCORES, "ece": 0.08}, {"ece": CHANGE}, BINS, BINS[:1])


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
