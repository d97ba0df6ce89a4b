import json
import math
from dataclasses import replace

import numpy as np
import pytest
from support.templates import conversation

from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import load_rows
from llmtune.errors import DataError
from llmtune.evaluate.classification_metrics import measure_correlation
from llmtune.evaluate.evaluation_file import load_evaluation, save_evaluation
from llmtune.evaluate.metric import PairedMeasures, measure_right, paired_difference
from llmtune.evaluate.slices import MISSING, read_slices, score_slices, split_by_value
from llmtune.recipe.loader import load_recipe

ROWS = 40
COLOURS = ("red", "green")


def right(values, at=None):
    return replace(measure_right(list(values), "exact_match"), at=tuple(at or range(len(values))))


def rows_of_two_kinds(extra=()):
    return [
        {
            **conversation(f"{i} colour?", COLOURS[i % 2]),
            "topic": ["sea", "sky", "wood"][i % 3],
            "size": i * 10,
            **dict(extra),
        }
        for i in range(ROWS)
    ]


def test_ranges_of_close_numbers_have_names_of_their_own():
    found = split_by_value([1234567.13 + i * 0.01 for i in range(60)])
    assert [len(rows) for rows in found.values()] == [15] * 4, found


def test_each_value_is_a_slice_most_frequent_first_and_missing_last():
    parts = split_by_value(["b", None, "a", "b", "", "c", "a", "b"])
    assert list(parts.items()) == [("b", {0, 3, 7}), ("a", {2, 6}), ("c", {5}), ("(none)", {1, 4})]


def test_of_many_values_the_twelve_most_frequent_get_a_slice():
    values = [f"v{i:02}" for i in range(20)] + ["v07", "v07", "v19"]
    parts = split_by_value(values)
    assert list(parts)[:3] == ["v07", "v19", "v00"]
    assert list(parts)[-1] == "(other)"
    assert len(parts) == 13
    assert len(parts["(other)"]) == 8


def test_numbers_with_many_values_form_four_ranges_with_equal_rows():
    parts = split_by_value([*range(100, 200), None])
    assert list(parts) == ["up to 124", "above 124, up to 149", "above 149, up to 174", "above 174", "(none)"]
    assert list(map(len, parts.values())) == [25, 25, 25, 25, 1]
    assert next(iter(split_by_value([i * 1_000_000 for i in range(16)]))) == "up to 3000000"
    assert next(iter(split_by_value([i / 64 for i in range(16)]))) == "up to 0.046875"
    assert (24 in parts["up to 124"], 25 in parts["above 124, up to 149"]) == (True, True)


def test_few_numbers_booleans_and_lists_are_plain_values():
    assert tuple(split_by_value([30, 4, 30])) == ("4", "30")
    assert tuple(split_by_value([True, False, True])) == ("true", "false")
    assert tuple(split_by_value([["a", "é"], ["a", "é"]])) == ('["a", "é"]',)
    assert list(split_by_value([math.nan, 1.0, *range(20)]))[-1] == MISSING


def test_values_that_differ_late_and_versions_have_slices_of_their_own():
    start = "x" * 90
    parts = split_by_value([start + "a", start + "b", start + "a", "(none)", None])
    assert sorted(map(sorted, parts.values())) == [[0, 2], [1], [3], [4]]
    assert all(len(name) < 90 for name in parts)
    assert split_by_value(["1.10", "1.1", "1.10"]) == {"1.10": {0, 2}, "1.1": {1}}
    assert split_by_value(["1.10", "1.1", "2.0.1"]).keys() == {"1.10", "1.1", "2.0.1"}
    assert split_by_value(["3.5", "3,5", "4"]) == {"3.5": {0, 1}, "4": {2}}


def test_a_slices_scores_cover_only_its_rows():
    generator = np.random.default_rng(0)
    before, after = generator.random(60) < 0.4, generator.random(60) < 0.8
    parts = {"a": {*range(0, 60, 2)}, "b": {*range(1, 60, 2)}}
    found = score_slices(
        {"kind": parts}, PairedMeasures({"exact_match": right(before)}, {"exact_match": right(after)}), 7
    )["kind"]
    assert [(one.value, one.rows) for one in found] == [("a", 30), ("b", 30)]
    for start, one in enumerate(found):
        assert one.base["exact_match"] == pytest.approx(before[start::2].mean())
        assert one.tuned["exact_match"] == pytest.approx(after[start::2].mean())
        assert one.difference["exact_match"] == paired_difference(right(before[start::2]), right(after[start::2]), 7)


def test_a_metric_on_some_rows_is_sliced_by_those_rows():
    parts = {"a": {0, 2}, "b": {1, 3}}
    some = right([True, False], at=(0, 2))
    (a, b) = score_slices({"kind": parts}, PairedMeasures({"exact_match": some}, {"exact_match": some}), 0)["kind"]
    assert (a.rows, a.difference["exact_match"].n, a.tuned["exact_match"]) == (2, 2, 0.5)
    assert (b.rows, b.tuned, b.difference) == (2, {}, {})


def test_a_slices_correlation_covers_only_its_rows():
    generator = np.random.default_rng(0)
    wanted, found = generator.random(40), generator.random(40)
    whole = measure_correlation("spearman", found, wanted)
    part = measure_correlation("spearman", found[::2], wanted[::2])
    sliced = replace(whole, at=tuple(range(40))).subset(range(0, 40, 2))
    assert sliced.value == pytest.approx(part.value)
    assert paired_difference(sliced, sliced, 0).n == 20


def test_a_slice_with_few_rows_has_scores_and_no_interval():
    parts = {"a": {*range(9)}}
    (one,) = score_slices({"k": parts}, PairedMeasures({"m": right([False] * 9)}, {"m": right([True] * 9)}), 0)["k"]
    change = one.difference["m"]
    assert (change.value, change.n) == (1, 9)
    assert math.isnan(change.low)
    assert change.p == 1


def test_both_models_are_scored_on_each_slice_and_survive_a_round_trip(make_bench, tmp_path):
    bench = make_bench(TWO_SLICES, rows_of_two_kinds())
    found = bench.evaluate(gates=())
    by_topic, by_size = found.slices["topic"], found.slices["size"]
    assert {one.value for one in by_topic} == {"sea", "sky", "wood"}
    assert sum(one.rows for one in by_topic) == sum(one.rows for one in by_size) == found.rows
    for metric in ("loss", "exact_match"):
        assert {metric} <= by_topic[0].base.keys() & by_topic[0].tuned.keys() & by_topic[0].difference.keys()
    mean = sum(one.rows * one.tuned["exact_match"] for one in by_topic) / found.rows
    assert mean == pytest.approx(found.tuned["exact_match"])
    assert "exact match by topic" in bench.console.file.getvalue()
    save_evaluation(found, tmp_path / "saved")
    assert repr(load_evaluation(tmp_path / "saved")) == repr(found)


TWO_SLICES = """
recipe_version: 1
name: colours
task: chat
data: {{train: {rows}, test: 0.4, validation: 0, deduplicate: none}}
model: {{name: {model}, dtype: float32}}
generation: {{max_new_tokens: 4}}
evaluate: {{metrics: [loss, exact_match], slices: [topic, size]}}
"""


def prepared(folder, console, rows, slices, **data):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text("task: chat\ndata: {train: rows.jsonl, test: 0.4}\nmodel: {name: m}\n")
    sets = [f"evaluate.slices={json.dumps(slices)}", *(f"data.{key}={json.dumps(data[key])}" for key in data)]
    return prepare_rows(load_recipe(str(folder / "recipe.yaml"), sets).recipe, folder / "prepared", console)


def test_slice_columns_change_what_is_stored_with_the_rows_and_not_the_rows(tmp_path, console):
    rows = rows_of_two_kinds()
    without = prepared(tmp_path, console, rows, [], deduplicate="none")
    with_topic = prepared(tmp_path, console, rows, ["topic"], deduplicate="none")
    again = prepared(tmp_path, console, rows, ["topic"], deduplicate="none")
    moved = prepared(tmp_path, console, [{**row, "topic": "sea"} for row in rows], ["topic"], deduplicate="none")
    assert without.columns_hash == ""
    assert without.content_hash == with_topic.content_hash == moved.content_hash
    assert with_topic.columns_hash == again.columns_hash != moved.columns_hash
    assert load_rows(tmp_path / "prepared") == moved


def test_a_used_or_renamed_column_can_be_a_slice(tmp_path, console):
    rows = [{"prompt": f"{i} colour?", "answer": COLOURS[i % 2], "source": "x"} for i in range(ROWS)]
    source = {"path": str(tmp_path / "rows.jsonl"), "columns": {"completion": "answer"}}
    found = prepared(tmp_path, console, rows, ["completion", "answer"], deduplicate="none", train=source)
    parts = read_slices(found, ["completion", "answer"], range(found.counts["test"]))
    assert set(parts["completion"]) == set(COLOURS)
    assert parts["completion"] == parts["answer"]


def test_an_unknown_column_is_an_error_with_the_nearest_match_and_all_names(tmp_path, console):
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, console, rows_of_two_kinds(), ["topc", "size", "page"], deduplicate="none")
    first, second = caught.value.problems
    assert (first.what, first.where) == ("no test row has a column 'topc'", "evaluate.slices")
    assert first.fix == "Did you mean 'topic'? The columns are: messages, topic, size."
    assert "'page'" in second.what


def test_rows_prepared_without_the_column_say_how_to_add_it(tmp_path, console):
    found = prepared(tmp_path, console, rows_of_two_kinds(), ["topic"], deduplicate="none")
    with pytest.raises(DataError, match="prepared without their column 'size'") as caught:
        read_slices(found, ["topic", "size"], range(5))
    assert "Run the recipe again" in str(caught.value)


def test_a_tables_texts_are_numbers_with_a_decimal_point_or_a_decimal_comma() -> None:
    numbers = [number / 4 for number in range(100)]
    expected = split_by_value(numbers)
    assert next(iter(expected)) == "up to 6"
    points = [f"{number:.2f}" for number in numbers]
    assert split_by_value(points) == expected
    assert split_by_value([text.replace(".", ",") for text in points]) == expected
    assert split_by_value([text.replace(".", "," if i < 50 else ".") for i, text in enumerate(points)]) == expected
    few = split_by_value(["10,5", "9,25", "", "10.5"])
    assert few == {"9.25": {1}, "10.5": {0, 3}, MISSING: {2}}
    assert [*split_by_value([f"0{number}" for number in range(1000, 1020)])][-1] == "(other)"  # postcodes


def test_a_value_with_the_name_of_missing_or_other_values_is_a_slice_of_its_own():
    values = ["(none)", None, "(other)", *"aabbccddeeffgghhiijjk", "(none)", "(other)"]
    parts = split_by_value(values)
    assert {name: parts[name] for name in ("'(none)'", "(none)", "'(other)'")} == {
        "'(none)'": {0, 24},
        "(none)": {1},
        "'(other)'": {2, 25},
    }
    assert parts["(other)"] == {23}
