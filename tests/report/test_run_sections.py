from dataclasses import replace

import pytest

from llmtune.report.render_html import to_html
from llmtune.report.render_markdown import to_markdown
from llmtune.report.report_page import make_report_page
from llmtune.report.run_sections import class_counts, data_section


def test_classes_are_counted_by_split_and_those_without_training_rows_are_marked(headed):
    table = class_counts(headed.data["classes"], "rows")
    assert table.title == "Classes: 1 of 3 have no training rows: praise"
    assert [[cell.text for cell in row[1:5]] for row in table.cells] == [
        ["900", "50", "43", "75.0 %"],
        ["300", "20", "43", "25.0 %"],
        ["0", "2", "14", "0.0 %"],
    ]
    assert to_html(make_report_page(headed)).count("<small>not in training</small>") == 1


@pytest.mark.parametrize(
    ("counts", "words"),
    [((900, 300), "the largest has 3 times the rows of the smallest"), ((100, 101), "balanced")],
)
def test_imbalance_is_described_in_words(counts, words):
    classes = {f"c{i}": {"train": number} for i, number in enumerate(counts)}
    assert class_counts(classes, "rows").title == f"Classes: {words}"


def test_tasks_without_token_prediction_show_no_share_of_tokens(report, headed):
    assert "It learns 3.5 % of all tokens." in to_html(make_report_page(report))
    assert "of all tokens" not in to_html(make_report_page(headed))
    table = data_section(headed.data, "classify").blocks[0].left[0]
    assert [column.heading for column in table.heads] == ["split", "rows", "tokens", "predictions"]


def test_the_summary_has_data_training_and_adapter_in_short(report):
    text = to_markdown(make_report_page(report))
    assert "| train | 1,290 | 118,230 | 3.6 % |" in text
    assert "first loss `1.440` · last training loss `0.3620`" in text
    assert "trained `4,884,480 of 139,399,488 parameters`" in text
    assert "sha256" not in text


def test_candidates_are_ranked_and_skipped_ones_have_a_reason(report):
    best = {"name": "a", "bits_per_byte": 1.25, "lower_bound": 2_000_000, "reason": None}
    other = {"name": "b", "bits_per_byte": None, "lower_bound": None, "reason": "does not fit"}
    page = to_html(make_report_page(replace(report, model={**report.model, "ranking": {"candidates": [best, other]}})))
    assert "skipped: does not fit" in page
    assert ">1.250<" in page
