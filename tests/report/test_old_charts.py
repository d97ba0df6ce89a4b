from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.report.number_format import count, duration, score, short, signed, size
from llmtune.report.old_charts import bar_chart, few_digits, interval_chart, line_chart, matrix_chart, ticks

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(FINITE, st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_enclose_the_values_in_even_steps(low, width, wanted):
    high = low + width
    if high - low < 1e-9 * abs(low):
        return
    found = ticks(low, high, wanted)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= wanted + 3


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=50))
def test_a_line_chart_of_any_numbers_is_well_formed(points):
    picture = line_chart([("train", points)], label='a "label" <b>')
    if picture:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
        assert "inf" not in picture


def test_a_chart_without_finite_points_is_left_out():
    assert line_chart([("train", [(1, math.nan)])], label="x") == ""
    assert bar_chart([0, 1], [0], label="x") == ""


@pytest.mark.parametrize(("better", "kind"), [(1, "better"), (-1, "worse")])
def test_an_interval_above_zero_is_right_of_it_only_where_more_is_better(better, kind):
    root = ElementTree.fromstring(interval_chart(0.2, 0.1, 0.3, reach=0.3, better=better, label="x"))
    dot, zero = root.find("circle"), root.findall("line")[1]
    assert dot.get("class") == f"dot {kind}"
    assert (float(dot.get("cx")) > float(zero.get("x1"))) is (better == 1)


def test_a_histogram_has_a_bar_a_count_as_high_as_it_is():
    root = ElementTree.fromstring(bar_chart([0, 10, 20, 30], [5, 10, 0], label="x"))
    heights = [float(bar.get("height")) for bar in root.findall("rect")]
    assert heights[0] == pytest.approx(heights[1] / 2, rel=0.01)
    assert heights[2] == 0


def test_a_field_of_the_matrix_is_tinted_by_its_share_of_the_row():
    root = ElementTree.fromstring(matrix_chart(["a", "b"], [[3, 1], [0, 8]], label="x"))
    fields = [field for field in root.findall("rect") if field.get("class") != "field"]
    assert [field.get("class") for field in fields] == ["hit", "miss", "miss", "hit"]
    tints = [float(field.get("fill-opacity")) for field in fields]
    assert tints[3] > tints[0] > tints[1] > tints[2] == 0
    written = [text.text for text in root.findall("text")]
    assert written[-6:] == ["3", "75 %", "1", "25 %", "8", "100 %"]


def test_a_long_label_keeps_the_end_that_tells_it_from_the_others():
    root = ElementTree.fromstring(
        matrix_chart(["department number 1", "the department number 12"], [[1, 0]] * 2, label="x")
    )
    names = [name.text for name in root.findall("text") if name.get("class") == "name"]
    assert names[0] == "department number 1"
    assert names[2] == "the depar…number 12"


@pytest.mark.parametrize(
    ("number", "wide", "written"),
    [
        (999, 42, "999"),
        (1250, 42, "1.2k"),
        (9949, 42, "9.9k"),
        (9999, 42, "10k"),
        (9999, 68, "9,999"),
        (12_500, 68, "12k"),
    ],
)
def test_a_count_fits_its_field(number, wide, written):
    assert few_digits(number, wide) == written


@given(st.lists(st.text(max_size=60), min_size=1, max_size=20, unique=True), st.integers(0, 10**7))
def test_a_matrix_of_any_labels_is_well_formed_and_holds_its_labels(labels, number):
    labels = [label for label in labels if label.isprintable()] or ["x"]
    picture = matrix_chart(labels, [[number] * len(labels)] * len(labels), label="confusion")
    root = ElementTree.fromstring(picture)
    width = float(root.get("width"))
    for text in root.findall("text"):
        x = float(text.get("x") or re.search(r"translate\(([\d.]+)", text.get("transform"))[1])
        assert 0 < x < width
    assert {title.text or "" for title in root.iterfind("text/title")} == set(labels)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (score(0.79731), "0.7973"),
        (score(-1.0411), "−1.041"),
        (score(79.314), "79.31"),
        (score(434.71), "434.7"),
        (score(0), "0.0000"),
        (score(2e-6), "2e-06"),
        (score(None), "–"),
        (score(math.nan), "–"),
        (signed(0.2), "+0.2000"),
        (signed(-0.2), "−0.2000"),
        (count(1234567), "1,234,567"),
        (size(538e6), "538 MB"),
        (size(1.527e9), "1.53 GB"),
        (size(12), "12 B"),
        (duration(4.2), "4.2 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(7500), "2 h 5 min"),
        (short(2e-4), "2e-4"),
        (short(15000), "15k"),
    ],
)
def test_numbers_read_well(made, wanted):
    assert made == wanted
