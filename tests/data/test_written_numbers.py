"""Numbers in tables: decimal points and commas, separators of thousands, and texts that are none."""

import json
from pathlib import Path

import pytest
from support.runs import invoke

from llmtune.data.rejected_rows import RowError
from llmtune.data.row_kind import hash_row
from llmtune.data.search_rows import embed_from_pair, ranked_pair
from llmtune.data.written_numbers import read_number, read_numbers


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["3.5", "12", "-0.25", "1e3"], [3.5, 12, -0.25, 1000]),
        (["3,5", "12", "-0,25", ""], [3.5, 12, -0.25, None]),
        (["1.234,56", "12", "7,5"], [1234.56, 12, 7.5]),
        (["1,234.56", "12", "7.5"], [1234.56, 12, 7.5]),
        (["1.234", "1.234.567"], [1234, 1234567]),
        (["1.234", "2.5"], [1.234, 2.5]),
        (["1,234", "3,5"], [1.234, 3.5]),
        (["1,234", "12,500", "7"], [1234, 12500, 7]),  # commas with three digits each separate thousands
        (["0,125", "1,250"], [0.125, 1.25]),  # but no number begins with a group of 0
        (["1 234,5", "1\u202f234,5", "3,5"], [1234.5, 1234.5, 3.5]),
        (["1'234.5", "2.5"], [1234.5, 2.5]),
        (["3,5", "3.5", "2"], [3.5, 3.5, 2]),  # two programs
        ([3, 4.5, None, float("nan"), "7"], [3, 4.5, None, None, 7]),
    ],
)
def test_a_column_of_numbers_is_read_with_one_decimal_sign(cells: list[object], numbers: list[object]) -> None:
    assert read_numbers(cells) == numbers


@pytest.mark.parametrize(
    "cells",
    [
        ["3,5", "3.5", "1.234"],  # 1.234 or 1234
        ["01234", "12345"],  # postcodes
        ["3,5", "many"],
        ["1,2,3"],
        ["2026-01-02"],
        ["", None],
        [True, False],
        [[1], [2]],
    ],
)
def test_other_columns_have_no_numbers(cells: list[object]) -> None:
    assert read_numbers(cells) is None


def test_a_single_cell_has_a_number_unless_its_comma_may_separate_thousands() -> None:
    cells = ["3,5", "0,125", "1.234,5", "1,234.5", "1,234,567", "1.234", "7"]
    assert [read_number(cell) for cell in cells] == [3.5, 0.125, 1234.5, 1234.5, 1234567, 1.234, 7]
    assert [read_number(cell) for cell in ("1,234", "a", "", None, True)] == [None] * 5


@pytest.mark.parametrize("cell", [1e308, "1e308", 10**400, "9" * 5000, "1e999", -1e31])
def test_a_number_too_large_for_a_mean_is_none(cell: object) -> None:
    assert read_number(cell) is None


def test_scores_and_relevances_may_have_a_decimal_comma() -> None:
    texts = {"query": "a", "passage": "b"}
    assert embed_from_pair({**texts, "score": "0,85"})["score"] == 0.85
    assert ranked_pair({**texts, "relevance": "0,5"})["relevances"] == [0.5]
    for parse, column in ((embed_from_pair, "score"), (ranked_pair, "relevance")):
        with pytest.raises(RowError, match="1,234"):
            parse({**texts, column: "1,234"})


def test_a_label_with_a_decimal_comma_is_the_same_content() -> None:
    rows = [{"text": "a", "pair": None, "label": label} for label in ("3.5", "3,5", 3.5, "3,6")]
    first, comma, number, other = map(hash_row, rows)
    assert first == comma == number != other


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "auto"])
def test_labels_with_decimal_commas_are_numbers_if_the_recipe_says_so(kind: str, here: Path) -> None:
    texts = ["late", "soon", "good", "bad", "open", "shut", "warm", "cold"]
    lines = [f"it was {a} and {b};{i},{j}" for i, a in enumerate(texts) for j, b in enumerate(texts)]
    Path("rows.csv").write_text("text;label\n" + "\n".join(lines) + "\n")
    recipe = {"recipe_version": 1, "task": "classify", "data": {"train": "rows.csv", "deduplicate": "none"}}
    recipe |= {"model": {"name": "builtin:minilm-l6-v2"}, "classify": {"kind": kind}, "train": {"num_train_epochs": 1}}
    Path("mine.yaml").write_text(json.dumps(recipe))
    done = invoke("prepare", "mine.yaml", "--out", "out")
    if kind == "auto":
        assert (done.exit_code, "set classify.kind: regression" in done.stderr) == (3, True), done.stderr
    else:
        assert done.exit_code == 0, done.stderr
