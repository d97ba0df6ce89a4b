from dataclasses import replace

import numpy as np
import pytest

from llmtune.evaluate.classification_metrics import measure_correlation
from llmtune.evaluate.metric import PairedMeasures, measure_right
from llmtune.evaluate.slices import split_by_value
from llmtune.evaluate.suites.group_gaps import find_gaps, gap_tables, group_rows, judge_gaps


def right(values, metric="exact_match"):
    return replace(measure_right(list(values), metric), at=tuple(range(len(values))))


def gaps_of(columns, base, tuned=None):
    """The gaps of one metric for two models, or for one model twice."""
    tuned = base if tuned is None else tuned
    return find_gaps(columns, PairedMeasures({base.metric: base}, {tuned.metric: tuned}))


def draws(shares, sizes, seed=0):
    """Correct answers per group at given shares, and the groups' rows."""
    generator = np.random.default_rng(seed)
    values = [generator.random(size) < share for share, size in zip(shares, sizes, strict=True)]
    return np.concatenate(values), [f"group {i}" for i, size in enumerate(sizes) for _ in range(size)]


def test_a_gap_is_the_best_served_group_minus_the_worst():
    before, names = draws((0.6, 0.6, 0.6), (50, 40, 30))
    after, _ = draws((0.9, 0.5, 0.7), (50, 40, 30), seed=1)
    (gap,) = gaps_of({"sex": split_by_value(names)}, right(before), right(after))
    means = {side: [v[:50].mean(), v[50:90].mean(), v[90:].mean()] for side, v in (("b", before), ("a", after))}
    (score,) = judge_gaps([gap], 0)
    assert score.tuned == pytest.approx(max(means["a"]) - min(means["a"]))
    assert score.base == pytest.approx(max(means["b"]) - min(means["b"]))
    assert score.change.value == pytest.approx(score.tuned - score.base)
    assert score.change.low < score.change.value < score.change.high
    assert score.change.n == 120


def test_groups_of_few_rows_are_named_and_not_compared():
    names = ["a"] * 20 + ["b"] * 20 + ["c"] * 9 + [None] * 3
    values = [True] * 20 + [False] * 10 + [True] * 10 + [False] * 9 + [True] * 3
    columns = {"kind": split_by_value(names), "empty": split_by_value(["x"] * 52)}
    gaps = gaps_of(columns, right(values, "m"))
    assert [gap.column for gap in gaps] == ["kind"]
    assert list(gaps[0].groups) == ["a", "b"]
    assert gaps[0].few == {"c": 9, "(none)": 3}
    judged = judge_gaps(gaps, 0)
    assert judged[0].tuned == 0.5
    shown, by_kind = gap_tables(gaps, judged)
    assert shown.rows[0][:4] == ("kind", "m", "b 0.5000", "a 1.000")
    assert [row[:4] for row in by_kind.rows] == [
        ("a", "20", "1.000", "1.000"),
        ("b", "20", "0.5000", "0.5000"),
        ("c", "9", "too few rows", ""),
        ("(none)", "3", "no value", ""),
    ]


def test_a_metric_on_some_rows_uses_the_groups_of_those_rows():
    parts = split_by_value(["a", "b"] * 30)
    some = replace(measure_right([True] * 24, "m"), at=tuple(range(0, 48, 2)))
    groups, _ = group_rows(parts, some)
    assert list(groups) == ["a"]
    assert gaps_of({"k": parts}, some) == []


def test_rank_metrics_have_gaps_too():
    generator = np.random.default_rng(0)
    wanted = generator.random(80)
    found = np.where(np.arange(80) < 40, wanted, generator.random(80))
    measure = replace(measure_correlation("spearman", found, wanted), at=tuple(range(80)))
    (gap,) = gaps_of({"k": split_by_value(["a"] * 40 + ["b"] * 40)}, measure)
    alone = measure_correlation("spearman", found[40:], wanted[40:]).value
    (score,) = judge_gaps([gap], 0)
    assert score.tuned == pytest.approx(1 - alone)


def simulate_change(shares, rows, seed, *, shared=True, people=1):
    """The change of the gap between groups with these true shares of base and tuned model, by persons of some rows."""
    generator, count = np.random.default_rng(seed), rows * len(shares[0])
    easy = np.repeat(generator.random((2, count // people)), people, axis=1)
    easy[1] = easy[0] if shared else easy[1]
    clusters = tuple(np.repeat(range(count // people), people).tolist()) if people > 1 else ()
    models = [
        replace(right(u < np.repeat(share, rows)), clusters=clusters) for u, share in zip(easy, shares, strict=True)
    ]
    names = [f"group {i}" for i in range(len(shares[0])) for _ in range(rows)]
    return judge_gaps(gaps_of({"k": split_by_value(names)}, *models), seed)[0].change


@pytest.mark.parametrize("people", [1, 5])
@pytest.mark.parametrize("base", [(1.0,) * 4, (0.8,) * 4])
def test_noise_alone_seldom_changes_the_gap(base, people):
    """A maximum of noisy gaps is above zero even if no group is served worse."""
    changes = [simulate_change((base, (0.8,) * 4), 50, seed, shared=False, people=people) for seed in range(20)]
    assert sum(change.low > 0 or change.high < 0 for change in changes) <= 1


def test_a_gap_that_grows_from_a_tenth_to_four_tenths_is_shown():
    changes = [simulate_change(((0.6, 0.5), (0.7, 0.3)), 120, seed) for seed in range(20)]
    assert sum(change.low <= 0.3 <= change.high for change in changes) >= 18
    assert sum(change.low > 0 for change in changes) >= 15
