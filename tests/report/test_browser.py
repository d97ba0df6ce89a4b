"""The report in a browser: plots drawn, nothing asked of the network, readable on a phone, in light and in dark."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.browser import PHONE_WIDTH, asked_of_the_network, browse, browser, on_a_phone, with_script

from llmtune.report.report_page import write_report

pytestmark = browser
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@pytest.fixture
def page(report: dict[str, Any], tmp_path: Path) -> Path:
    write_report(report, tmp_path)
    return tmp_path / "report.html"


def unlocked(page: Path) -> Path:
    """The page without the rule that no script runs in it, for a visitor to measure it."""
    copy = page.with_name("unlocked.html")
    copy.write_text(POLICY.sub("", page.read_text("utf-8")), "utf-8")
    return copy


def visitor(name: str) -> str:
    """A script that looks at the page and leaves what it found in it."""
    return (Path(__file__).parent / "visitors" / f"{name}.js").read_text("utf-8")


def measured(shown: str) -> Any:
    found = re.search(r'<pre id="measured">([^<]*)</pre>', shown)
    assert found is not None, shown[-500:]
    return json.loads(found[1].replace("&amp;", "&"))


def test_every_plot_is_drawn(page: Path) -> None:
    plots = measured(browse(with_script(unlocked(page), visitor("plots"))))
    assert len(plots) == 3 + 3 + 1, "an interval a metric; loss, rate and norm; lengths"
    for width, height, marks, inside in plots:
        assert width > 60
        assert height > 8
        assert marks >= 3
        assert inside == marks


def test_no_request_leaves_the_page_even_if_one_is_smuggled_in(page: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    browse(page, log)
    assert asked_of_the_network(log) == set()
    smuggled = page.read_text("utf-8").replace("</body>", '<img src="http://127.0.0.1:9/image"></body>')
    page.write_text(smuggled, "utf-8")
    browse(page, log)
    assert asked_of_the_network(log) == set()
    browse(unlocked(page), log)  # without the page's policy it would be seen
    assert asked_of_the_network(log) == {"http://127.0.0.1:9/image"}


def test_nothing_stands_out_of_a_phone(page: Path) -> None:
    width, needed, out = measured(browse(on_a_phone(unlocked(page), visitor("phone"))))
    assert width == PHONE_WIDTH
    assert out == []
    assert needed <= width


def test_text_can_be_read_in_light_and_in_dark(page: Path) -> None:
    grounds = []
    for dark in (False, True):
        ground, contrasts = measured(browse(with_script(unlocked(page), visitor("contrast")), dark=dark))
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])) / 3)
        assert len(contrasts) > 60
        assert [text for contrast, text in contrasts if contrast < 1] == [], "WCAG 2.2, 1.4.3"
    assert grounds[0] > 200
    assert grounds[1] < 60
