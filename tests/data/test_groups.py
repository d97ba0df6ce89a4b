"""Groups (`data.split_by`): one value in several spellings and files is one group, at each place that reads groups."""

import json
import math
from datetime import date, datetime
from decimal import Decimal

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import chat, make_recipe, prepare, write_jsonl

from llmtune.data.row_hash import plain_value
from llmtune.data.row_store import iterate_columns, iterate_groups, iterate_rows
from llmtune.evaluate.slices import read_slices

SAME = {
    "number": (12, 12.0, "12", "12.0", " 12 ", Decimal("12.00")),
    "fraction": (0.5, "0.5", "0.50", ".5", Decimal("0.50")),
    "large number": (12345678901234567890, "12345678901234567890", "12345678901234567890.0"),
    "truth": (True, "true", "True", "TRUE "),
    "day": (date(2024, 1, 2), datetime(2024, 1, 2), "2024-01-02", "2024-01-02 00:00:00", "2024-01-02T00:00:00"),
    "time": (datetime(2024, 1, 2, 3, 4, 5), "2024-01-02 03:04:05", "2024-01-02T03:04:05"),
    "text": ("caf\u00e9 bar", "cafe\u0301 bar ", "cafe\u0301 \u00a0\nbar"),
    "list": ([1, "a"], [1.0, "a "]),
    "missing": (None, "", "  ", math.nan),
}


@pytest.mark.parametrize("values", SAME.values(), ids=SAME)
def test_one_value_has_one_form(values):
    (form,) = {plain_value(value) for value in values}
    assert plain_value(form) == form


def test_other_values_have_other_forms():
    values = [12, "012", 1, True, "a", "A", 1.5, "2024-01-02", "2024-01-02T03:04", "2024-13-45", math.inf, -12]
    assert len({plain_value(value) for value in values}) == len(values)


def sides(rows):
    """Return the customer numbers of each split."""
    return {
        split: {json.loads(row["messages"][0]["content"])[0] for _, row in iterate_rows(rows, split)}
        for split in ("train", "validation", "test")
    }


FILES = {
    "jsonl": write_jsonl,
    "csv": lambda path, rows: pandas.DataFrame(rows).to_csv(path, index=False),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


@pytest.mark.parametrize("other", [float, str, lambda number: f"{number}.0 "])
@pytest.mark.parametrize(("first", "second"), [("jsonl", "csv"), ("jsonl", "parquet"), ("csv", "parquet")])
def test_a_customer_is_on_one_side_whatever_the_type_of_its_number(tmp_path, first, second, other):
    def rows(kind):
        return [
            {"prompt": json.dumps([n, str(kind), i]), "completion": "yes", "customer": kind(n)}
            for n in range(80)
            for i in range(2)
        ]

    for kind, file, name in ((int, first, f"a.{first}"), (other, second, f"b.{second}")):
        FILES[file](tmp_path / name, rows(kind))
    split = sides(prepare(tmp_path, [f"a.{first}", f"b.{second}"], split_by="customer", test=0.3, validation=0.2))
    assert set().union(*split.values()) == set(range(80))
    assert not split["train"] & split["test"]
    assert not split["train"] & split["validation"]
    assert not split["validation"] & split["test"]


def test_a_customer_of_a_test_file_is_dropped_from_train_whatever_the_type(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [chat(f"q{n}", c=n) for n in range(6)])
    write_jsonl(tmp_path / "test.jsonl", [chat("a", c=3.0), chat("b", c="4")])
    rows = prepare(tmp_path, "train.jsonl", test="test.jsonl", split_by="c")
    assert (rows.counts["train"], rows.dropped) == (4, {"same c as a test row": 2})


def test_rows_of_one_customer_are_one_cluster_of_the_evaluation(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [chat("q", c=1)])
    values = [12, 12.0, "12", "12.0", "13"]
    write_jsonl(tmp_path / "test.jsonl", [chat(f"t{n}", c=value) for n, value in enumerate(values)])
    rows = prepare(tmp_path, "train.jsonl", test="test.jsonl", split_by="c")
    *same, other = iterate_groups(rows, "test")
    assert len({*same}) == 1
    assert other not in same


@pytest.mark.parametrize("key", ["evaluate.slices", "evaluate.fairness.groups"])
def test_rows_of_one_value_are_one_slice(tmp_path, key):
    from rich.console import Console

    from llmtune.data.preparation import prepare_rows

    write_jsonl(tmp_path / "train.jsonl", [chat("q", c=1)])
    values = [12, 12.0, "12", "12.0 ", "13", True, "True", None, " "]
    write_jsonl(tmp_path / "test.jsonl", [chat(f"t{n}", c=value) for n, value in enumerate(values)])
    recipe = make_recipe(tmp_path, "train.jsonl", test="test.jsonl")
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"slices": ("c",)})})
    rows = prepare_rows(recipe, tmp_path / "out", Console(quiet=True))
    assert len([*iterate_columns(rows, "test")]) == 9
    parts = read_slices(rows, ("c",), range(9), key)["c"]
    assert sorted(map(sorted, parts.values())) == [[0, 1, 2], [3], [4], [5, 6], [7, 8]]


@pytest.mark.parametrize("value", [None, "", "  ", math.nan])
def test_a_blank_value_is_no_group(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(chat(f"q{n}", c=value if n == 3 else n)) + "\n" for n in range(40)))
    rows = prepare(tmp_path, "a.jsonl", test=0.2, split_by="c")
    assert rows.dropped == {"bad: no value to split by": 1}
