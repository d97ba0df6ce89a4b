from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.report.blocks import Curve, Curves, Dots, Heatmap, Histogram, Interval
from llmtune.report.charts import draw_curves, draw_dots, draw_heatmap, draw_histogram, draw_interval, ticks

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(FINITE, st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_enclose_the_values_in_even_steps(low, width, count):
    high = low + width
    if high - low < 1e-9 * abs(low):
        return
    marks = ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= count + 3


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=50))
def test_curves_of_any_numbers_are_well_formed(points):
    picture = draw_curves(Curves([Curve("loss", points)], label='a "label" <b>'))
    if picture:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
        assert "inf" not in picture


def test_a_chart_without_anything_to_draw_is_left_out():
    assert draw_curves(Curves([Curve("loss", [(1, math.nan)])], label="x")) == ""
    assert draw_histogram(Histogram([0, 1], [0], label="x")) == ""
    assert draw_dots(Dots("x", 1.0, [1.0, 1.0])) == ""
    assert draw_interval(Interval("x", 0.1, math.nan, 0.2, 1)) == ""


@pytest.mark.parametrize(("better", "tone"), [(1, "better"), (-1, "worse")])
def test_an_interval_above_zero_is_right_of_it_only_where_more_is_better(better, tone):
    root = ElementTree.fromstring(draw_interval(Interval("x", 0.2, 0.1, 0.3, better)))
    dot, zero = root.find("circle"), root.findall("line")[1]
    assert dot.get("class") == f"dot {tone}"
    assert (float(dot.get("cx")) > float(zero.get("x1"))) is (better == 1)


def test_dots_lie_in_the_order_of_their_scores_with_the_base_as_a_stroke():
    root = ElementTree.fromstring(draw_dots(Dots("x", 0.1, [0.5, 0.3])))
    first, second = (float(dot.get("cx")) for dot in root.findall("circle"))
    assert float(root.findall("line")[1].get("x1")) < second < first


def test_a_histogram_has_a_bar_a_count_as_high_as_it_is():
    root = ElementTree.fromstring(draw_histogram(Histogram([0, 10, 20, 30], [5, 10, 0], label="x")))
    heights = [float(bar.get("height")) for bar in root.findall("rect")]
    assert heights[0] == pytest.approx(heights[1] / 2, rel=0.01)
    assert heights[2] == 0


def test_a_cell_of_a_heatmap_is_tinted_by_its_size_and_coloured_by_its_sign():
    values, texts = [[0.75, -0.25], [0.0, 1.0]], [["3\n75 %", "1\n25 %"], ["", "8\n100 %"]]
    root = ElementTree.fromstring(draw_heatmap(Heatmap(["a", "b"], ["a", "b"], values, "x", texts=texts)))
    cells = [cell for cell in root.findall("rect") if cell.get("class") != "field"]
    assert [cell.get("class") for cell in cells] == ["hit", "miss", "hit", "hit"]
    tints = [float(cell.get("fill-opacity")) for cell in cells]
    assert tints[3] > tints[0] > tints[1] > tints[2] == 0
    written = [text.text for text in root.findall("text") if text.get("class") in ("count", "part")]
    assert written == ["3", "75 %", "1", "25 %", "8", "100 %"]


def test_a_long_label_keeps_the_end_that_tells_it_from_the_others():
    names = ["department number 1", "the department number 12"]
    root = ElementTree.fromstring(draw_heatmap(Heatmap(names, names, [[1.0, 0.0]] * 2, "x")))
    shown = [name.text for name in root.findall("text") if name.get("class") == "name"]
    assert shown[0] == "department number 1"
    assert shown[1] == "the depar…number 12"


@given(st.lists(st.text(max_size=60), min_size=1, max_size=20, unique=True))
def test_a_heatmap_of_any_labels_is_well_formed_and_holds_its_labels(labels):
    labels = [label for label in labels if label.isprintable()] or ["x"]
    picture = draw_heatmap(Heatmap(labels, labels, [[0.5] * len(labels)] * len(labels), "confusion"))
    root = ElementTree.fromstring(picture)
    width = float(root.get("width"))
    for text in root.findall("text"):
        x = float(text.get("x") or re.search(r"translate\(([\d.]+)", text.get("transform"))[1])
        assert 0 < x < width
    assert {title.text or "" for title in root.iterfind("text/title")} == set(labels)
