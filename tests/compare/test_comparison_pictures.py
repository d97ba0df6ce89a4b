"""The picture of quality against cost."""

import re
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest

from llmtune.compare.comparison_pictures import draw_pareto, find_front, find_intervals
from llmtune.compare.run_comparison import RunPair, RunSummary
from llmtune.records import Difference
from llmtune.store.report_record import Verdict

COLOURED = ("lora", "full", "ia3", "miss")
CANT_TELL = Verdict("inconclusive", "")


def make_run(name: str, score: float, seconds: float) -> RunSummary:
    costs = {"train_seconds": seconds, "peak_bytes": 10**9, "trainable": int(1e5 * seconds), "disk_bytes": 10**6}
    other = dict.fromkeys(("folder", "method", "model", "seed", "learning_rate", "batch", "steps", "tokens"))
    other |= dict.fromkeys(("run_seconds", "parameters", "share", "forgotten", "baseline", "base", "difference"))
    return RunSummary(name=name, tuned={"accuracy": score}, verdict=CANT_TELL, **costs, **other)


def make_pairs(runs):
    for first, second in combinations(runs, 2):
        value = second.tuned["accuracy"] - first.tuned["accuracy"]
        yield RunPair(
            first.name,
            second.name,
            {"accuracy": Difference(value, value - 0.05, value + 0.05, 0.5, 60)},
            {},
            CANT_TELL,
        )


RUNS = [make_run("lora", 0.9, 80), make_run("full", 0.91, 160), make_run("ia3", 0.7, 70), make_run("miss", 0.9, 81)]


def test_the_front_has_the_points_that_none_beats_at_their_cost():
    assert find_front([(3, 0.9), (1, 0.5), (2, 0.5), (4, 0.8), (1, 0.4)]) == [1, 0]


def test_intervals_are_of_the_difference_from_the_best_in_any_order():
    found = dict(find_intervals("full", list(make_pairs(RUNS)), "accuracy"))
    assert found == {
        "lora": pytest.approx((-0.06, 0.04)),
        "ia3": pytest.approx((-0.26, -0.16)),
        "miss": pytest.approx((-0.06, 0.04)),
    }


def test_clearly_worse_runs_are_grey_and_names_do_not_overlap(tmp_path):
    draw_pareto(tmp_path / "pareto", RUNS, list(make_pairs(RUNS)), "accuracy")
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    texts = [
        (one.text, one.get("style", ""), one.get("transform", ""))
        for one in ET.parse(tmp_path / "pareto.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    grey = {text for text, style, _ in texts if "#64748b" in style}
    assert grey == {"ia3"}
    width, height = 4 * 4, 7  # of four letters of seven points
    boxes = []
    for text, style, place in texts:
        if text in COLOURED:
            x, y = map(float, re.findall(r"[-\d.]+", place)[-2:])
            boxes.append((text, x - width * ("end" in style), y))
    assert len(boxes) == 4 * len(RUNS)
    for (one, x, y), (other, right, up) in combinations(boxes, 2):
        assert abs(x - right) > width or abs(y - up) > height, (one, other)
