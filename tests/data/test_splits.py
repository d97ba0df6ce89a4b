import csv
import json
import tempfile
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import chat, make_recipe, prepare, questions, rows_of, write_jsonl

from llmtune.errors import DataError
from llmtune.records import SPLITS

TEXTS = [f"{i} is the number of text {i * 7}" for i in range(90)]


def split(folder: Path, rows, **data):
    write_jsonl(folder / "a.jsonl", rows)
    return prepare(folder, "a.jsonl", **({"validation": 0.1, "test": 0.2} | data))


def test_splits_have_their_shares_and_are_disjoint(tmp_path):
    rows = split(tmp_path, [chat(f"question {i}") for i in range(4000)])
    assert sum(rows.counts.values()) == 4000
    assert abs(rows.counts["test"] - 800) < 100
    assert abs(rows.counts["validation"] - 400) < 75
    sides = [set(names) for names in questions(rows).values()]
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)


@given(st.sets(TEXT, min_size=60, max_size=90), st.integers(40, 60), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_a_row_keeps_its_split_when_the_data_grows_and_is_shuffled(texts, first, rng):
    texts = sorted(texts)
    rng.shuffle(texts)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        small = split(Path(one), [chat(text) for text in texts[:first]], validation=0.2, test=0.3)
        rng.shuffle(texts)
        large = split(Path(two), [chat(text) for text in texts], validation=0.2, test=0.3)
        before, after = questions(small), questions(large)
        for side, names in before.items():
            assert set(names) <= set(after[side])


def test_a_larger_share_gains_rows_and_loses_none(tmp_path):
    rows = [chat(f"question {i}") for i in range(300)]
    less, more = split(tmp_path, rows, out="less", test=0.1), split(tmp_path, rows, out="more", test=0.3)
    assert set(questions(less)["test"]) < set(questions(more)["test"])


def test_few_rows_give_each_split_one(tmp_path):
    for count in range(3, 12):
        rows = split(tmp_path, [chat(f"q{i}") for i in range(count)], validation=0.01, test=0.01)
        assert rows.counts["validation"] == rows.counts["test"] == 1
        assert rows.counts["train"] == count - 2


def test_too_few_rows_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"2 different rows .* too few for test \(0.2\) and validation \(0.1\)"):
        split(tmp_path, [chat("a"), chat("b")])
    with pytest.raises(DataError, match="too few"):
        split(tmp_path, [chat("a"), chat("a"), chat("a")])


def test_shares_that_leave_no_training_rows_are_an_error(tmp_path):
    with pytest.raises(DataError, match="too few"):
        split(tmp_path, [chat("a"), chat("b"), chat("c")], validation=0.5, test=0.4999)


def test_rows_with_an_equal_value_stay_together(tmp_path):
    rows = [chat(f"question {i}", customer=i % 40) for i in range(400)]
    sides = questions(split(tmp_path, rows, split_by="customer"))
    customers = {side: {int(name.split()[1]) % 40 for name in names} for side, names in sides.items()}
    assert sum(len(found) for found in customers.values()) == 40
    assert all(customers.values())


def test_a_split_by_value_counts_the_same_as_number_and_as_text(tmp_path):
    numbers = questions(split(tmp_path, [chat(f"q{i}", c=i % 9) for i in range(90)], split_by="c", out="one"))
    texts = questions(split(tmp_path, [chat(f"q{i}", c=str(i % 9)) for i in range(90)], split_by="c", out="two"))
    assert numbers == texts


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("completion", {"text": TEXTS, "group": [date(2026, 1, 1 + i % 9) for i in range(90)]}),
        ("completion", {"text": TEXTS, "group": [Decimal(i % 9) / 4 for i in range(90)]}),
        ("completion", {"text": TEXTS, "group": [i % 9 for i in range(90)]}),
        ("classify", {"text": TEXTS, "label": [i / 8 for i in range(90)]}),
        ("classify", {"text": TEXTS, "label": [i % 3 == 0 for i in range(90)]}),
        ("classify", {"text": TEXTS, "label": [i % 3 for i in range(90)]}),
        ("embed", {"query": TEXTS, "passage": TEXTS[::-1], "score": [i % 6 / 5 for i in range(90)]}),
    ],
    ids=lambda value: value if isinstance(value, str) else type([*value.values()][-1][0]).__name__,
)
def test_rows_keep_their_split_when_a_file_changes_its_format(tmp_path, task, columns):
    """The conversions that users do: JSON Lines to Parquet to CSV, each with its own types."""
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table.column_names)
        writer.writeheader()
        writer.writerows(table.to_pylist())
    write_jsonl(tmp_path / "rows.jsonl", [json.loads(json.dumps(row, default=str)) for row in table.to_pylist()])
    found = []
    for ending in ("jsonl", "parquet", "csv"):
        more = {"split_by": "group"} if "group" in columns else {}
        rows = prepare(tmp_path, f"rows.{ending}", task, ending, validation=0.2, test=0.2, **more)
        texts = [
            [row.get("text") or row.get("query") or row["completion"] for row in rows_of(rows, side)] for side in SPLITS
        ]
        found.append(texts)
    assert found[0] == found[1]
    assert found[0] == found[2]


def test_a_row_without_a_split_by_value_is_bad(tmp_path):
    rows = [chat(f"question {i}", customer=i) for i in range(40)] + [chat("no one")]
    assert split(tmp_path, rows, split_by="customer").dropped == {"bad: no value to split by": 1}


def test_rows_that_share_the_value_of_a_given_test_source_are_not_trained_on(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [chat("t", customer="ann")])
    write_jsonl(tmp_path / "a.jsonl", [chat("a", customer="ann"), chat("b", customer="bob"), chat("c", customer="cat")])
    rows = prepare(tmp_path, "a.jsonl", test="test.jsonl", validation=0.01, split_by="customer")
    sides = questions(rows)
    assert sorted(sides["train"] + sides["validation"]) == ["b", "c"]
    assert rows.dropped == {"same customer as a test row": 1}


def test_own_sources_go_to_their_split_and_shares_apply_to_the_others(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"a{i}") for i in range(100)])
    write_jsonl(tmp_path / "t.jsonl", [chat(f"t{i}") for i in range(30)])
    rows = prepare(tmp_path, "a.jsonl", validation=0.2, test="t.jsonl")
    assert rows.counts["test"] == 30
    assert rows.counts["validation"] + rows.counts["train"] == 100
    assert all(name.startswith("a") for name in questions(rows)["validation"])


def test_a_weight_repeats_training_rows_and_chooses_a_fraction_by_hash(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chat(f"a{i}") for i in range(1000)])
    write_jsonl(tmp_path / "b.jsonl", [chat(f"b{i}") for i in range(1000)])
    sources = [{"path": "a.jsonl", "weight": 2.5}, {"path": "b.jsonl", "weight": 0.25}]
    rows = prepare(tmp_path, sources, test=0.1)
    sides = questions(rows)
    assert len(sides["test"]) == len(set(sides["test"]))
    copies = [sides["train"].count(name) for name in {name for name in sides["train"] if name[0] == "a"}]
    assert set(copies) == {2, 3}
    assert abs(sum(copies) / len(copies) - 2.5) < 0.06
    kept = [name for name in sides["train"] if name[0] == "b"]
    assert len(kept) == len(set(kept))
    assert abs(len(kept) - 225) < 60
    assert rows.dropped["left out by weight"] + len(kept) + sum(name[0] == "b" for name in sides["test"]) == 1000


def test_a_limit_takes_the_first_good_rows_of_all_files_of_a_source(tmp_path):
    write_jsonl(tmp_path / "d" / "a.jsonl", [chat("a0"), chat(""), chat("a1")])
    write_jsonl(tmp_path / "d" / "b.jsonl", [chat("b0"), chat("b1")])
    rows = prepare(tmp_path, {"path": "d", "limit": 3}, max_dropped=0.5)
    assert [row["messages"][0]["content"] for row in rows_of(rows)] == ["a0", "a1", "b0"]


def test_the_seed_does_not_move_the_split(tmp_path):
    from rich.console import Console

    from llmtune.data.preparation import prepare_rows

    write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(50)])
    recipe = make_recipe(tmp_path, "a.jsonl", test=0.2)
    hashes = {
        prepare_rows(recipe.model_copy(update={"seed": seed}), tmp_path / str(seed), Console(quiet=True)).content_hash
        for seed in (1, 2)
    }
    assert len(hashes) == 1
