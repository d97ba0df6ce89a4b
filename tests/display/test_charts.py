import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.display.charts import Curve, draw_curves, draw_histogram, draw_interval, ticks

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
    picture = draw_curves([Curve("loss", points)], label='a "label" <b>')
    if picture:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
        assert "inf" not in picture


def test_a_chart_without_data_is_omitted():
    assert draw_curves([Curve("loss", [(1, math.nan)])], label="x") == ""
    assert draw_histogram([0, 1], [0], label="x") == ""
    assert draw_interval(0.1, math.nan, 0.2, better=1, label="x") == ""


@pytest.mark.parametrize(("better", "tone"), [(1, "better"), (-1, "worse")])
def test_an_interval_above_zero_is_drawn_on_the_right_only_if_more_is_better(better, tone):
    root = ElementTree.fromstring(draw_interval(0.2, 0.1, 0.3, better=better, label="x"))
    dot, zero = root.find("circle"), root.findall("line")[1]
    assert dot.get("class") == f"dot {tone}"
    assert (float(dot.get("cx")) > float(zero.get("x1"))) is (better == 1)


def test_a_histogram_has_a_bar_per_count_with_its_height():
    root = ElementTree.fromstring(draw_histogram([0, 10, 20, 30], [5, 10, 0], label="x"))
    heights = [float(bar.get("height")) for bar in root.findall("rect")]
    assert heights[0] == pytest.approx(heights[1] / 2, rel=0.01)
    assert heights[2] == 0
