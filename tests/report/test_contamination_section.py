"""Test rows that stand in the training rows, in page, Markdown and JSON."""

from __future__ import annotations

import json

import pytest

from llmtune.records import Difference
from llmtune.report.assembly import difference_json
from llmtune.report.contamination_section import overlap, sentence
from llmtune.report.report_markdown import to_markdown
from llmtune.report.report_view import make_view
from llmtune.report.write import write_report

FOUND = {
    "rows": 148,
    "train_rows": 1290,
    "equal": 0,
    "near": 3,
    "short": 20,
    "worded": 1,
    "shared": 9,
    "overlapping": 12,
    "common": 210,
    "dropped": {"near a test row": 17},
    "examples": [
        {
            "kind": "13 words in a row",
            "test": "/home/ada/data/test.jsonl:4",
            "train": "/home/ada/data/train.jsonl:9",
            "words": "late <b>parcel</b>",
        }
    ],
}
VERDICT = {"verdict": {"word": "helped", "reason": ""}}


def part(name, rows, tuned, change):
    difference = {"choice_accuracy": difference_json(Difference(tuned - 0.1, *change, 0.01, rows, "McNemar exact"))}
    return {"value": name, "rows": rows, "base": {"choice_accuracy": 0.1}, "tuned": {"choice_accuracy": tuned}} | {
        "difference": difference
    }


@pytest.fixture
def overlapping(report):
    scores = [part("clean rows", 136, 0.75, (0.5, 0.8)), part("overlapping rows", 12, 1.0, (0.7, 1.0))]
    report["evaluation"]["contamination"] = FOUND | {"scores": scores}
    return report


def test_the_page_says_how_many_overlap_and_what_the_scores_are_without_them(overlapping, tmp_path):
    write_report(overlapping, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'href="#overlap"' in page
    assert "12 of 148 test rows (8.1 %) overlap with a training row" in page
    assert "3 nearly equal, 9 with 13 words in a row in common, 1 short, with the same words." in page
    assert "17 other rows were kept out" in page
    assert "clean rows" in page
    assert "210 runs of 13 words stand in more than ten training rows" in page
    assert "test.jsonl:4" in page
    assert "/home/ada/data/test.jsonl" not in page
    assert "late &lt;b&gt;parcel&lt;/b&gt;" in page
    view = make_view(overlapping | VERDICT)["overlap"]
    assert [(kind["rows"], kind["of"], kind["share"]) for kind in view["kinds"]] == [
        ("0", "148", "0.0 %"),
        ("3", "148", "2.0 %"),
        ("9", "128", "7.0 %"),
        ("1", "20", "5.0 %"),
    ]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["evaluation"]["contamination"]["overlapping"] == 12


def test_the_summary_has_the_scores_of_clean_rows(overlapping):
    text = to_markdown(overlapping | VERDICT)
    assert "## Overlap with training data" in text
    assert "| clean rows | 0.1000 | 0.7500 | +0.6500 | +0.5000 to +0.8000 | 136 |" in text
    assert "| all rows | 0.5200 | 0.8000 |" in text


def test_without_any_overlap_one_sentence_says_so(overlapping, tmp_path):
    none = dict.fromkeys(("equal", "near", "worded", "shared", "overlapping", "common"), 0)
    overlapping["evaluation"]["contamination"] |= none | {"scores": [], "examples": [], "dropped": {}}
    write_report(overlapping, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "None of the 148 test rows overlaps with a training row" in page
    assert "what they share" not in page
    assert "| clean rows" not in (tmp_path / "report.md").read_text()


def test_numbers_of_one_read_well():
    one = FOUND | {"overlapping": 1, "near": 0, "worded": 0, "shared": 1, "dropped": {"near a test row": 1}}
    assert "1 of 148 test rows (0.7 %) overlaps with a training row" in sentence(one)
    assert "1 other row was kept out" in sentence(one)


def test_a_report_of_an_earlier_version_has_no_such_section(report, tmp_path):
    assert overlap(report["evaluation"]) is None
    write_report(report, tmp_path)
    assert "#overlap" not in (tmp_path / "report.html").read_text()
