from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtune.report import write_report
from llmtune.report.report_markdown import code, table

HOSTILE = (
    "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> | `a``b` | </pre></style> {{ 7*7 }} {% raw %} "
    "\x00\x1b[31m\u2028 # h"
)
VOID = {"meta", "link", "br", "img", "input", "hr"}
SECTIONS = ("data", "model", "adapter", "train", "evaluation", "deploy")


class Page(HTMLParser):
    """Collects what a browser would see, and fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write(report, folder):
    write_report(report, folder)
    return {name: (folder / name).read_text() for name in ("report.html", "report.md", "report.json", "junit.xml")}


def test_the_page_says_the_verdict_first_and_has_every_section(report, tmp_path):
    page = Page(write(report, tmp_path)["report.html"])
    assert page.ids == [
        "verdict",
        "gates",
        "scores",
        "samples",
        "inside",
        "training",
        "data",
        "model",
        "adapter",
        "steps",
        "method",
        "recipe",
    ]
    assert (
        page.text.index("The tuning helped")
        < page.text.index("1 of 2 gates failed")
        < page.text.index("Scores on held-out")
    )
    for fact in (
        "choice_accuracy",
        "+0.1900 to +0.3600",
        "near duplicate",
        "1,290",
        "4,884,480 of 139,399,488",
        "2 min 23 s",
        "538 MB",
    ):
        assert fact in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 3 + 1  # intervals, curves, lengths
    assert "tickets.jsonl:118" in page.text
    assert "/home/ada" not in page.text


def test_the_page_asks_nothing_of_the_network(report, tmp_path):
    text = write(report, tmp_path)["report.html"]
    for tag, attributes in Page(text).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "img", "video", "audio"}
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert re.match(r"(#|data:,$)", attributes.get(name) or "#")
    assert not re.search(r"@import|url\s*\(", text)
    assert "default-src 'none'" in text


def test_the_example_marks_what_is_learned(report, tmp_path):
    text = write(report, tmp_path)["report.html"]
    assert "<mark>delivery&lt;|im_end|&gt;</mark>" in text
    assert "Late parcel&lt;|im_end|&gt;\n<mark>" in text


def test_hostile_text_stays_text_everywhere(report, tmp_path):
    report["name"] = HOSTILE
    report["recipe_yaml"] = HOSTILE
    report["gates"][0]["name"] = HOSTILE
    report["data"]["dropped"] = {HOSTILE: 1}
    report["data"]["example"] = [[HOSTILE, True]]
    report["evaluation"]["samples"][0] |= {
        "prompt": HOSTILE,
        "base": HOSTILE,
        "reference": HOSTILE,
        "tuned_choice": HOSTILE,
    }
    report["evaluation"]["signatures"] = {HOSTILE: HOSTILE}
    report["model"]["name"] = HOSTILE
    texts = write(report, tmp_path)
    page = Page(texts["report.html"])
    assert {tag for tag, _ in page.tags} & {"script", "img"} == set()
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "49" not in page.text.split("{{ 7*7 }}")[1][:5]
    rows = [line for line in texts["report.md"].splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in rows}
    assert widths == {4, 8}  # gates and samples; scores
    ElementTree.fromstring(texts["junit.xml"])
    json.loads(texts["report.json"])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(), max_size=60))
def test_a_code_span_holds_any_text_in_one_table_cell(text):
    span = code(text)
    assert span.splitlines() == [span]
    assert not re.search(r"(?<!\\)\|", span)
    fence = re.match(r"`+", span)
    if fence:
        inside = span[len(fence[0]) : -len(fence[0])]
        assert fence[0] not in re.findall(r"`+", inside)
        assert span.endswith(fence[0])
    assert len(table(["a"], [[span]]).splitlines()) == 3


def test_junit_has_a_test_case_a_gate_and_a_failure_for_each_that_failed(report, tmp_path):
    root = ElementTree.fromstring(write(report, tmp_path)["junit.xml"])
    assert root.tag == "testsuites"
    (suite,) = root.findall("testsuite")
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == ("2", "1", "0")
        assert float(element.get("time")) == 71.5
    assert [child.tag for child in suite] == ["properties", "testcase", "testcase"]
    passed, failed = suite.findall("testcase")
    assert all(case.get("name") and case.get("classname") and case.get("time") for case in (passed, failed))
    assert [part.tag for part in passed] == ["properties"]
    (_, failure) = failed
    assert failure.tag == "failure"
    assert failure.get("message") == failure.text == "wanted exact_match >= 0.9, got 0.8"
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["tuned.exact_match"] == "0.8000"
    assert properties["verdict"].startswith("helped")


def test_a_run_without_gates_is_an_empty_suite(report, tmp_path):
    report["gates"] = []
    root = ElementTree.fromstring(write(report, tmp_path)["junit.xml"])
    assert root.get("tests") == "0"
    assert root.findall(".//testcase") == []


def test_json_keeps_the_report_and_adds_the_verdict(report, tmp_path):
    found = json.loads(write(report, tmp_path)["report.json"])
    assert found.pop("verdict")["word"] == "helped"
    assert found == json.loads(json.dumps(report))


def test_numbers_that_json_cannot_hold_become_null_and_a_dash(report, tmp_path):
    report["evaluation"]["tuned"]["loss"] = math.nan
    report["evaluation"]["difference"]["loss"] = {
        "value": math.nan,
        "interval": [math.nan, math.inf],
        "p": math.nan,
        "n": 148,
    }
    report["train"]["curve"][3]["loss"] = math.inf
    report["train"]["validation_loss"] = math.nan
    texts = write(report, tmp_path)
    found = json.loads(texts["report.json"], parse_constant=pytest.fail)
    assert found["evaluation"]["difference"]["loss"] == {"value": None, "interval": [None, None], "p": None, "n": 148}
    for text in texts.values():
        assert not re.search(r"\b(nan|inf|Infinity|NaN)\b", text)


@pytest.mark.parametrize("reached", range(len(SECTIONS)))
def test_a_run_that_stopped_on_the_way_has_a_report_of_what_it_reached(report, tmp_path, reached):
    for section in SECTIONS[reached:]:
        report[section] = None
    report["gates"] = report["gates"] if reached > 4 else []
    texts = write(report, tmp_path)
    page = Page(texts["report.html"])
    assert ("data" in page.ids, "training" in page.ids, "scores" in page.ids) == (reached > 0, reached > 3, reached > 4)
    if reached <= 4:
        assert "Nothing was measured" in texts["report.md"]


def test_a_report_with_hardly_anything_in_it_is_written(tmp_path):
    texts = write({"name": "bare"}, tmp_path)
    assert "bare" in Page(texts["report.html"]).text
    assert json.loads(texts["report.json"])["verdict"]["word"] == "can't tell"


def test_a_long_curve_does_not_make_a_large_page(report, tmp_path):
    report["train"]["curve"] = [
        {"step": i, "loss": 1.0 + i % 7, "grad_norm": 1.0, "learning_rate": 1e-4} for i in range(100_000)
    ]
    assert len(write(report, tmp_path)["report.html"]) < 80_000


def test_secrets_stand_in_none_of_the_files(report, tmp_path):
    token = "hf_" + "abcDEF0123456789" * 2
    report["evaluation"]["samples"][0]["base"] = f"my token is {token}"
    report["recipe"]["train"]["api_key"] = "plain-looking-value"
    report["recipe_yaml"] += f"env: HF_TOKEN={token}\n"
    report["hardware"]["proxy"] = "http://ada:lovelace@proxy.example:3128"
    for text in write(report, tmp_path).values():
        assert token not in text
        assert "plain-looking-value" not in text
        assert "lovelace" not in text


def test_nothing_but_the_four_files_is_left(report, tmp_path):
    write(report, tmp_path)
    write(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["junit.xml", "report.html", "report.json", "report.md"]


def test_the_report_needs_neither_torch_nor_transformers_nor_numpy():
    script = "import sys, llmtune.report; print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
