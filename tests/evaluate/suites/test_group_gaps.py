from dataclasses import replace

import numpy as np
import pytest

from llmtune.evaluate.classification_metrics import measure_correlation
from llmtune.evaluate.metric import PairedMeasures, measure_right
from llmtune.evaluate.slices import split_by_value
from llmtune.evaluate.suites.group_gaps import find_gaps, gap_tables, group_rows, score_gap


def right(values, metric="exact_match"):
    return replace(measure_right(list(values), metric), at=tuple(range(len(values))))


def gaps_of(columns, base, tuned=None, seed=0):
    """The gaps of one metric for two models, or for one model twice."""
    tuned = base if tuned is None else tuned
    return find_gaps(columns, PairedMeasures({base.metric: base}, {tuned.metric: tuned}), seed)


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
    score = score_gap([gap])
    assert score.tuned == pytest.approx(max(means["a"]) - min(means["a"]))
    assert score.base == pytest.approx(max(means["b"]) - min(means["b"]))
    assert score.difference.value == pytest.approx(score.tuned - score.base)
    assert score.difference.low < score.difference.value < score.difference.high
    assert score.difference.n == 120
    assert score.p < 0.01


def test_a_chance_gap_is_above_zero_and_not_rare():
    values, names = draws((0.5,) * 6, (12,) * 6, seed=2)
    (gap,) = gaps_of({"town": split_by_value(names)}, right(values))
    score = score_gap([gap])
    assert 0.2 < score.chance < 0.5
    assert score.p > 0.05
    assert (score.difference.value, score.difference.low, score.difference.high) == (0, 0, 0)


def test_groups_of_few_rows_are_named_and_not_compared():
    names = ["a"] * 20 + ["b"] * 20 + ["c"] * 9 + [None] * 3
    values = [True] * 20 + [False] * 10 + [True] * 10 + [False] * 9 + [True] * 3
    columns = {"kind": split_by_value(names), "empty": split_by_value(["x"] * 52)}
    gaps = gaps_of(columns, right(values, "m"))
    assert [gap.column for gap in gaps] == ["kind"]
    assert list(gaps[0].groups) == ["a", "b"]
    assert gaps[0].few == {"c": 9, "(none)": 3}
    assert score_gap(gaps).tuned == 0.5
    shown, by_kind = gap_tables(gaps)
    assert shown.rows[0][:4] == ("kind", "m", "b 0.5", "a 1")
    assert by_kind.rows == (
        ("a", "20", "1", "1"),
        ("b", "20", "0.5", "0.5"),
        ("c", "9", "too few rows", ""),
        ("(none)", "3", "no value", ""),
    )


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
    score = score_gap([gap])
    assert score.tuned == pytest.approx(1 - alone)
    assert score.p < 0.02


def test_the_largest_gap_of_several_columns_counts():
    values, names = draws((0.9, 0.3), (60, 60))
    columns = {"sex": split_by_value(names), "odd": split_by_value([str(i % 2) for i in range(120)])}
    gaps = gaps_of(columns, right(values), right(~values))
    assert score_gap(gaps).tuned == max(score_gap([gap]).tuned for gap in gaps) == score_gap(gaps[:1]).tuned
    assert score_gap(gaps).difference.value == pytest.approx(0)


def test_the_interval_of_a_change_covers_it_at_its_nominal_rate():
    """Two groups whose gap grows from 0.1 to 0.4."""
    held = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        easy = generator.random(240)
        shares = np.repeat([[0.6, 0.5], [0.7, 0.3]], 120, axis=1)
        base, tuned = (right(easy < share) for share in shares)
        names = ["a"] * 120 + ["b"] * 120
        (gap,) = gaps_of({"k": split_by_value(names)}, base, tuned, seed)
        change = score_gap([gap]).difference
        held += change.low <= 0.3 <= change.high
    assert held >= 36
