"""The report in a browser: plots drawn, nothing asked of the network, readable on a phone, in light and in dark."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.browser import PHONE_WIDTH, asked_of_the_network, browse, browser, on_a_phone, with_script

from llmtune.report.write import write_report

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


def measured(shown: str) -> Any:
    found = re.search(r'<pre id="measured">([^<]*)</pre>', shown)
    assert found is not None, shown[-500:]
    return json.loads(found[1].replace("&amp;", "&"))


MEASURE = """
const pre = document.createElement("pre");
pre.id = "measured";
pre.textContent = JSON.stringify(found);
document.documentElement.append(pre);
"""


def test_every_plot_is_drawn(page: Path) -> None:
    look = """
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    const found = [...document.querySelectorAll("svg")].map(plot => {
      const box = plot.getBoundingClientRect();
      const marks = [...plot.querySelectorAll("path, rect, circle, polyline, line")];
      const inside = marks.filter(mark => mark.getBoundingClientRect().right <= box.right + 1);
      return [box.width, box.height, marks.length, inside.length];
    });
    """
    plots = measured(browse(with_script(unlocked(page), look + MEASURE)))
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
    look = """
    for (const fold of page.querySelectorAll("details")) fold.open = true;
    const scrolls = node => node && (/auto|scroll/.test(frame.contentWindow.getComputedStyle(node).overflowX)
      || scrolls(node.parentElement));
    const out = [...page.querySelectorAll("body *")].filter(
      node => node.getBoundingClientRect().right > frame.clientWidth + 1 && !scrolls(node));
    const found = [frame.clientWidth, page.documentElement.scrollWidth, out.map(node => node.outerHTML.slice(0, 80))];
    """
    width, needed, out = measured(browse(on_a_phone(unlocked(page), look + MEASURE)))
    assert width == PHONE_WIDTH
    assert out == []
    assert needed <= width


def test_text_can_be_read_in_light_and_in_dark(page: Path) -> None:
    look = """
    const light = colour => {
      const [r, g, b] = colour.match(/[0-9.]+/g).map(part => (part /= 255) <= .04045 ? part / 12.92
        : ((part + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b;
    };
    const ground = node => {
      const colour = getComputedStyle(node).backgroundColor;
      return /, 0\\)$/.test(colour) && node.parentElement ? ground(node.parentElement) : colour;
    };
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    const texts = [...document.querySelectorAll("body *")].filter(node => !node.closest("svg") && node.offsetWidth
      && [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()));
    const found = [getComputedStyle(document.body).backgroundColor, texts.map(node => {
      const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
      const large = parseFloat(getComputedStyle(node).fontSize) >= 24;
      return [(a + .05) / (b + .05) / (large ? 3 : 4.5), node.textContent.trim().slice(0, 40)];
    })];
    """
    grounds = []
    for dark in (False, True):
        ground, contrasts = measured(browse(with_script(unlocked(page), look + MEASURE), dark=dark))
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])) / 3)
        assert len(contrasts) > 60
        assert [text for contrast, text in contrasts if contrast < 1] == [], "WCAG 2.2, 1.4.3"
    assert grounds[0] > 200
    assert grounds[1] < 60
