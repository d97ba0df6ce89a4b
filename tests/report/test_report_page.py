import json
import re

import pytest

from llmtune.report.report_page import (
    explain_section,
    explanation_link,
    find_explanations,
    link_explanations,
    write_report,
)

LINKS = re.compile(r'<a href="(explain/[^"]*)">([^<]*)</a>')


@pytest.fixture
def run(report, tmp_path):
    """A run folder with a report and the names given as pages."""

    def build(*names):
        write_report(report, tmp_path)
        (tmp_path / "explain").mkdir(exist_ok=True)
        for name in names:
            (tmp_path / "explain" / name).write_text("<!doctype html>")
        return tmp_path

    return build


def test_pages_are_linked_in_an_order_that_does_not_depend_on_the_disk(run):
    folder = run("positions.html", "zebra.html", "generation-why.html", "attention.html", "attention.png", ".new.html")
    assert find_explanations(folder) == ["attention", "generation-why", "positions", "zebra"]
    assert link_explanations(folder)
    assert LINKS.findall((folder / "report.html").read_text()) == [
        ("explain/attention.html", "Attention"),
        ("explain/generation-why.html", "Generation: why"),
        ("explain/positions.html", "Positions"),
        ("explain/zebra.html", "zebra"),
    ]


def test_linking_changes_nothing_else_and_can_be_done_again(run, report):
    folder = run("attention.html")
    before = json.loads((folder / "report.json").read_text())
    texts = {name: (folder / name).read_text() for name in ("report.md", "junit.xml")}
    for _ in range(2):
        assert link_explanations(folder)
        assert json.loads((folder / "report.json").read_text()) == {**before, "explanations": ["attention"]}
        assert {name: (folder / name).read_text() for name in texts} == texts
    (folder / "explain" / "attention.html").unlink()
    link_explanations(folder)
    assert LINKS.findall((folder / "report.html").read_text()) == []


def test_a_trained_run_without_pages_says_what_to_type(run, report):
    text = (run() / "report.html").read_text()
    assert "llmtune explain generation RUN --prompt TEXT" in text
    assert 'href="#inside"' in text
    assert explain_section([], trained=False).blocks == []


@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff\xfe"])
def test_without_a_report_that_can_be_read_nothing_is_written(tmp_path, content):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "report.json").write_bytes(data)
    before = sorted(tmp_path.iterdir())
    assert not link_explanations(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_the_name_of_a_page_cannot_lead_elsewhere():
    assert explanation_link('x" onclick="alert(1)')[0] == "explain/x%22%20onclick%3D%22alert%281%29.html"
    assert explanation_link("javascript:alert(1)")[0] == "explain/javascript%3Aalert%281%29.html"
