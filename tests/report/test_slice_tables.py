from __future__ import annotations

import json
from typing import Any

import pytest

from llmtune.report.report_markdown import to_markdown
from llmtune.report.slice_tables import flips, slices
from llmtune.report.write import write_report


def change(value: float, low: float | None, high: float | None, n: int) -> dict[str, Any]:
    return {"value": value, "interval": [low, high], "p": 0.001, "n": n, "test": "McNemar exact"}


def part(value: str, n: int, gain: float) -> dict[str, Any]:
    few = n < 10
    return {
        "value": value,
        "rows": n,
        "base": {"loss": 1.0, "exact_match": 0.5},
        "tuned": {"loss": 0.4, "exact_match": 0.5 + gain},
        "difference": {
            "loss": change(-0.6, -0.8, -0.4, n),
            "exact_match": change(gain, None if few else gain - 0.1, None if few else gain + 0.1, n),
        },
    }


@pytest.fixture
def parted(report: dict[str, Any]) -> dict[str, Any]:
    (sample,) = report["evaluation"]["samples"]
    flipped = {**sample, "prompt": "<b>Where</b> is my parcel?", "base_choice": "billing", "tuned_choice": "praise"}
    report["evaluation"] |= {
        "slices": {"channel": [part("e-mail | post", 60, 0.3), part("<i>fax</i>", 40, -0.2), part("phone", 8, 0.3)]},
        "flips": {
            "choice_accuracy": {"gained": 50, "lost": 1, "rows": 148, "gained_rows": [sample], "lost_rows": [flipped]},
            "exact_match": {"gained": 0, "lost": 0, "rows": 148, "gained_rows": [], "lost_rows": []},
        },
    }
    report["evaluation"]["difference"]["exact_match"]["test"] = "McNemar exact"
    return report


def test_a_slice_is_coloured_by_its_own_interval_and_few_rows_say_so(parted):
    (column,) = slices(parted["evaluation"])
    assert column["column"] == "channel"
    assert [table["metric"] for table in column["tables"]] == ["exact_match", "loss"]
    first, second, third = column["tables"][0]["rows"]
    assert [row["kind"] for row in (first, second, third)] == ["better", "worse", "unsure"]
    assert first["interval"] == "+0.2000 to +0.4000"
    assert (third["interval"], third["p"], third["n"]) == ("too few rows", "–", "8")
    assert column["tables"][1]["rows"][0]["kind"] == "better"


def test_flips_are_told_each_way_the_metric_that_says_most_first(parted):
    first, second = flips(parted["evaluation"], "chat")
    assert (first["metric"], [way["count"] for way in first["ways"]]) == ("choice_accuracy", ["50", "1"])
    assert second["ways"][0]["samples"] == []


def test_a_report_without_slices_or_flips_shows_neither(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'id="slices"' not in page
    assert 'id="flips"' not in page
    assert "What flipped" not in (tmp_path / "report.md").read_text()


def test_slices_and_flips_stand_in_all_reports_as_text(parted, tmp_path):
    write_report(parted, tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in (
        "Scores by slice",
        "&lt;i&gt;fax&lt;/i&gt;",
        "too few rows",
        "What flipped",
        "50 wrong before, right now",
    ):
        assert text in page
    assert "&lt;b&gt;Where&lt;/b&gt; is my parcel?" in page
    assert "p of exact match: McNemar’s exact test" in page
    told = json.loads((tmp_path / "report.json").read_text())["evaluation"]
    assert told["flips"]["choice_accuracy"]["lost"] == 1
    assert told["slices"]["channel"][2]["difference"]["exact_match"]["interval"] == [None, None]


def test_the_summary_has_a_table_a_column_and_the_counts(parted):
    text = to_markdown({**parted, "verdict": {"word": "helped", "reason": "So it is."}})
    assert "### channel: exact\\_match" in text
    assert r"| `e-mail \| post` | 0.5000 | 0.8000 | +0.3000 | +0.2000 to +0.4000 | 60 |" in text
    assert "| `choice_accuracy` | 50 | 1 | 148 |" in text
