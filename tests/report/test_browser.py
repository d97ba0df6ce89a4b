"""Test the report in a browser: plots, no network requests, readable on a phone, in light and dark mode."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.browser import Page, browser, open_browser
from support.http_server import answering

from llmtune.records import Difference
from llmtune.report.report_page import write_report
from llmtune.store.report_record import Report
from llmtune.store.score_records import Control, GateResult, Slice

pytestmark = browser
PHONE_WIDTH = 375
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def written(report: dict[str, Any], tmp_path: Path) -> Path:
    write_report(report, tmp_path)
    return tmp_path / "report.html"


@pytest.fixture
def shown(chromium: Page, written: Path) -> Page:
    """Open the report in the browser, on a wide screen in light mode."""
    chromium.resize(1000, 900)
    chromium.open(written.as_uri())
    return chromium


def visit(page: Page, name: str) -> Any:
    """Return the result of running a script of `visitors` in the page."""
    script = (Path(__file__).parent / "visitors" / f"{name}.js").read_text("utf-8")
    return page.run(f"(() => {{ {script} }})()")


def test_every_plot_is_drawn(shown: Page) -> None:
    plots = visit(shown, "plots")
    assert len(plots) == 3 + 3 + 1, "an interval a metric; loss, rate and norm; lengths"
    for width, height, marks, inside in plots:
        assert width > 60
        assert height > 8
        assert marks >= 3
        assert inside == marks


def test_no_request_leaves_the_page_even_if_one_is_smuggled_in(shown: Page, written: Path) -> None:
    assert all(address.startswith(("file:", "data:", "about:")) for address in shown.asked), shown.asked
    arrived: list[str] = []

    def answer(verb: str, path: str, *about: object) -> tuple[int, Any, dict[str, str]]:
        arrived.append(path)
        return 404, b"", {}

    with answering(answer) as url:
        smuggled = written.read_text("utf-8").replace("</body>", f'<img src="{url}/image"></body>')
        written.write_text(smuggled, "utf-8")
        shown.open(f"{written.as_uri()}?smuggled")
        assert arrived == []
        written.write_text(POLICY.sub("", smuggled), "utf-8")
        shown.open(f"{written.as_uri()}?unlocked")
        assert arrived == ["/image"], "without the page's policy it would arrive"


def test_nothing_overflows_on_a_phone(shown: Page) -> None:
    shown.resize(PHONE_WIDTH, 900)
    width, needed, out = visit(shown, "phone")
    assert width == PHONE_WIDTH
    assert out == []
    assert needed <= width


def test_gates_and_picture_controls_fit_a_phone(chromium: Page, report: Report, tmp_path: Path) -> None:
    """A gate is a card, as four columns break its words; the intervals of controls wrap."""
    change = Difference(-0.2843, -0.3921, -0.1456, p=0.001, n=100)
    slices = Slice("all", 100, {"accuracy": 0.43}, {"accuracy": 0.83}, {})
    control = Control({"accuracy": 0.4}, {"accuracy": 0.5}, {"accuracy": change}, {"accuracy": change}, slices, 100)
    evaluation = replace(report.evaluation, controls={"blind": control, "swapped": control})
    gate = GateResult("accuracy.low > champion - 0.01", "accuracy.low > 0.7432", "0.7321 (inconclusive)", None)
    write_report(replace(report, evaluation=evaluation, gates=[gate]), tmp_path)
    chromium.resize(PHONE_WIDTH, 900)
    chromium.open((tmp_path / "report.html").as_uri())
    width, needed, out = visit(chromium, "phone")
    assert out == []
    assert needed <= width
    assert chromium.run("getComputedStyle(document.querySelector('#gates tbody tr')).display") == "flex"


def test_text_can_be_read_in_light_and_in_dark(shown: Page) -> None:
    grounds = []
    for dark in (False, True):
        shown.resize(1000, 900, dark)
        ground, contrasts = visit(shown, "contrast")
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])) / 3)
        assert len(contrasts) > 60
        assert [text for contrast, text in contrasts if contrast < 1] == [], "WCAG 2.2, 1.4.3"
    assert grounds[0] > 200
    assert grounds[1] < 60
