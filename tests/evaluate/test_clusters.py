"""Rows that belong together (`data.split_by`): groups are drawn and swapped as units, from data to report."""

import json
from dataclasses import replace

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import prepare, write_jsonl
from support.templates import conversation

from llmtune.evaluate.eval_inputs import cluster_rows
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.metric import measure_right, paired_difference, ratio
from llmtune.evaluate.paired_statistics import difference, difference_weighted, name_groups, row_deviation, share_bounds
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.report.score_sections import score_section
from llmtune.store.score_records import Evaluation

SIZES = [(12, 5), (20, 10), (100, 4)]


def rows_that_flip_together(generator, groups, size):
    moved = np.repeat(generator.choice([-1, 0, 1], groups, p=[0.2, 0.6, 0.2]), size)
    base = np.where(moved == 0, generator.random(groups * size) < 0.6, moved < 0)
    moves = (moved != 0) & (generator.random(groups * size) < 0.9)
    return base.astype(float), np.where(moves, 1 - base, base).astype(float)


def losses_that_move_together(generator, groups, size):
    base = generator.gamma(2, 1, groups * size)
    own, shared = generator.normal(0, 0.45, groups * size), np.repeat(generator.normal(0, 0.9, groups), size)
    return base, base + own + shared


def scores_that_move_together(generator, groups, size):
    base = 0.3 + 0.4 * generator.random(groups * size)
    own, shared = generator.normal(0, 0.06, groups * size), np.repeat(generator.normal(0, 0.12, groups), size)
    return base, np.clip(base + own + shared, 0, 1)


DRAWS = {
    rows_that_flip_together: {"right_wrong": True},
    losses_that_move_together: {"right_wrong": False},
    scores_that_move_together: {"right_wrong": False, "bounds": share_bounds},
}


def false_alarms(draw, groups, size, trials):
    """Shares of trials without a true difference whose interval excludes zero, and whose p is below 5 %."""
    generator, clusters, found = np.random.default_rng(5), np.repeat(np.arange(groups), size), np.zeros(2)
    for _ in range(trials):
        sums = [np.stack([one, np.ones(len(one))], 1) for one in draw(generator, groups, size)]
        change = difference(*sums, ratio, seed=0, resamples=600, clusters=clusters, **DRAWS[draw])
        found += change.low > 0 or change.high < 0, change.p <= 0.05
    return found / trials


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_correlated_groups_seldom_raise_a_false_alarm(draw):
    """Ungrouped, their rows do in about 3 of 10 trials."""
    assert max(false_alarms(draw, 12, 5, 300)) <= 0.065


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(("groups", "size"), SIZES)
@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_groups_raise_a_false_alarm_in_at_most_65_of_1000_trials(draw, groups, size):
    assert max(false_alarms(draw, groups, size, 2000)) <= 0.065


@pytest.mark.parametrize("right_wrong", [True, False])
def test_singleton_groups_give_exactly_the_ungrouped_result(right_wrong):
    generator = np.random.default_rng(1)
    base, tuned = (
        replace(measure_right(list(generator.random(40) < 0.5), "exact_match"), right_wrong=right_wrong)
        for _ in range(2)
    )
    assert paired_difference(base, replace(tuned, clusters=tuple(range(40))), 0) == paired_difference(base, tuned, 0)


def test_five_copies_of_each_row_give_no_more_evidence_than_the_rows():
    generator = np.random.default_rng(2)
    base, tuned = (np.stack([generator.normal(0, 1, 30), np.ones(30)], 1) for _ in range(2))
    clusters = np.repeat(np.arange(30), 5)
    rows = difference(base, tuned, ratio, right_wrong=False, seed=0)
    groups = difference(
        *(np.repeat(one, 5, 0) for one in (base, tuned)), ratio, right_wrong=False, seed=0, clusters=clusters
    )
    assert (groups.value, groups.low, groups.high) == pytest.approx((rows.value, rows.low, rows.high))
    assert (groups.p, groups.n, groups.groups) == (pytest.approx(rows.p), 150, 30)
    assert row_deviation(groups) == pytest.approx(row_deviation(rows) * 5**0.5)


def test_rank_metrics_draw_groups_too():
    generator = np.random.default_rng(2)
    base, tuned, clusters = generator.normal(0, 1, 30), generator.normal(0, 1, 30), np.repeat(np.arange(30), 5)

    def mean(numbers):
        return lambda counts_RN: counts_RN @ numbers / counts_RN.sum(1)

    base, tuned = (np.append(one, [low, high]) for one, low, high in ((base, 9, -9), (tuned, -9, 9)))
    rows = difference_weighted(mean(base), mean(tuned), 30, 1, seed=0)
    copies = (mean(np.append(np.repeat(one[:30], 5), one[30:])) for one in (base, tuned))
    groups = difference_weighted(*copies, 150, 1, seed=0, clusters=clusters)
    assert (groups.value, groups.low, groups.high) == pytest.approx((rows.value, rows.low, rows.high))
    assert (groups.n, groups.groups) == (150, 30)


def test_a_measure_keeps_its_groups_when_rows_are_removed_and_reordered():
    one = replace(measure_right([True, False, True, True], "exact_match"), at=(0, 1, 2, 3), clusters=(7, 7, 8, 9))
    assert one.subset({1, 2}).clusters == (7, 8)
    assert one.take([3, 0]).clusters == (9, 7)


def test_an_inconclusive_gate_names_the_rows_and_groups_it_needs():
    generator = np.random.default_rng(3)
    base, tuned = rows_that_flip_together(generator, 12, 5)
    clusters = tuple(np.repeat(np.arange(12), 5).tolist())
    models = [replace(measure_right(one.tolist(), "exact_match"), clusters=clusters) for one in (base, tuned)]
    change, scores = paired_difference(*models, seed=0), [{"exact_match": one.value} for one in models]
    gates = EvaluateSection(gates=("exact_match.low > base - 0.05",), when_unsure="report")
    (found,) = check_gates(gates, Evaluation(*scores, {"exact_match": change}, (), 60))
    assert found.passed is None
    assert "60 rows in 12 groups are too few" in found.note
    assert " groups would tell" in found.note


@given(
    st.lists(st.sets(st.sampled_from("abcdef"), max_size=3), max_size=12),
    st.booleans(),
    st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
def test_rows_that_share_a_picture_or_a_group_belong_together(pictures, grouped, drawn):
    groups = drawn[: len(pictures)] if grouped else []
    shown = [row for row in pictures if row]
    common = set.intersection(*shown) if shown else set()
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(pictures)))
    for row, contents in enumerate(pictures):
        keys = [f"picture {one}" for one in (contents - common or contents)]
        graph.add_edges_from((row, key) for key in [*keys, *(f"group {one}" for one in groups[row : row + 1])])
    parts = [{one for one in part if isinstance(one, int)} for part in networkx.connected_components(graph)]
    clusters = cluster_rows(pictures, groups)
    assert bool(clusters) == (len(parts) < len(pictures))
    if clusters:
        found = [{row for row, number in enumerate(clusters) if number == cluster} for cluster in set(clusters)]
        assert sorted(map(sorted, found)) == sorted(map(sorted, parts))


def test_rows_with_one_sampled_prompt_belong_together():
    assert cluster_rows([set()] * 4, [], {0: (1, 2), 1: (1,), 3: (1, 2)}) == (0, 1, 2, 0)
    assert cluster_rows([set()] * 2, [], {0: (1,), 1: (2,)}) == ()


def test_groups_of_unequal_size_tell_as_much_as_fewer_equal_ones():
    clusters = tuple(np.repeat(range(8), [20, 1, 1, 1, 1, 1, 1, 1]).tolist())
    models = [replace(measure_right([n % 9 < right for n in range(27)], "m"), clusters=clusters) for right in (4, 6)]
    change = paired_difference(*models, seed=0)
    assert (change.groups, change.effective) == (8, pytest.approx(27**2 / 407))
    assert name_groups(change.n, change) == " in 8 groups, as informative as 1 equal ones,"
    section = score_section(Evaluation({"m": 0.4}, {"m": 0.6}, {"m": change}, (), 27), "chat")
    assert "as much as 1.8 of equal size" in section.blocks[-1].text


def test_an_example_picture_in_every_row_joins_no_rows():
    assert cluster_rows([{"example", "a"}, {"example", "b"}, {"example", "a"}, set()], []) == (0, 1, 0, 2)
    assert cluster_rows([{"page"}] * 3, []) == (0, 0, 0)


GROUPED = """
recipe_version: 1
name: colours
task: chat
data: {{train: {rows}, test: 0.4, validation: 0, deduplicate: none, split_by: page}}
model: {{name: {model}, dtype: float32}}
generation: {{max_new_tokens: 6}}
"""


def test_groups_reach_scores_file_and_report(make_bench, tmp_path):
    rows = [{**conversation(f"What is {i}?", f"It is {i % 3}."), "page": f"page {i // 5}"} for i in range(100)]
    bench = make_bench(GROUPED, rows)
    bench.steps = 0
    found = bench.evaluate(metrics=("loss", "exact_match"), folder=tmp_path)
    change = found.difference["loss"]
    assert change.n == 5 * change.groups
    measures = load_measures(tmp_path)
    assert len(set(measures.clusters)) == change.groups
    assert len(measures.tuned["loss"].clusters) == change.n
    (table, text) = score_section(found, "chat").blocks
    assert f"{change.n} in {change.groups} groups" in json.dumps([[str(cell) for cell in row] for row in table.rows])
    assert "data.split_by" in text.text


def test_other_groups_of_the_same_rows_are_scored_again(tmp_path):
    """Intervals depend on the groups; the rows, their splits and the trained model do not."""
    found = []
    for size in (1, 1, 4):
        rows = [{**conversation(f"What is {i}?", "That."), "page": f"page {i // size}"} for i in range(20)]
        write_jsonl(tmp_path / "test.jsonl", rows)
        write_jsonl(tmp_path / "train.jsonl", [conversation(f"Why {i}?", "That.") | {"page": "a"} for i in range(9)])
        found.append(prepare(tmp_path, "train.jsonl", test="test.jsonl", split_by="page"))
    assert len({rows.content_hash for rows in found}) == 1
    assert found[0].columns_hash == found[1].columns_hash != found[2].columns_hash


def test_test_rows_from_a_file_have_groups_too(make_bench, tmp_path):
    rows = [{**conversation(f"What is {i}?", "That."), "page": f"page {i // 4}"} for i in range(40)]
    held_out = write_jsonl(tmp_path / "test.jsonl", rows)
    text = GROUPED.replace("test: 0.4", f"test: {held_out}")
    training = [{**conversation(f"Why {i}?", "That."), "page": f"other {i}"} for i in range(20)]
    bench = make_bench(text, training)
    bench.steps = 0
    change = bench.evaluate(metrics=("loss",)).difference["loss"]
    assert (change.n, change.groups) == (40, 10)


def test_groups_of_one_row_each_are_named_as_such(make_bench):
    rows = [{**conversation(f"What is {i}?", f"It is {i}."), "page": f"page {i}"} for i in range(30)]
    bench = make_bench(GROUPED, rows)
    bench.steps = 0
    found = bench.evaluate(metrics=("loss",))
    assert found.difference["loss"].groups == 0
    assert "one by one" in found.signatures["intervals.groups"]
