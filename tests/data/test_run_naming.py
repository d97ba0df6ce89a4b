"""The default run folder's name: which content of the data changes it, and what explains a new one."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from pyarrow import Table

from llmtune.data.run_naming import Content, _list_changes, default_folder
from llmtune.errors import DataError
from llmtune.recipe.loader import load_recipe

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(4)]


def folder(place: Path, **data: Any) -> str:
    recipe = {"recipe_version": 1, "name": "tickets", "task": "classify", "data": data, "model": {"name": "./base"}}
    (place / "tickets.yaml").write_text(json.dumps(recipe))
    return str(default_folder(load_recipe(place / "tickets.yaml")))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffix:
        case ".parquet":
            parquet.write_table(Table.from_pylist(rows), path)
        case ".csv":
            path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))
        case _:
            path.write_text(lines)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "rows.parquet", "rows.jsonl.gz"])
@pytest.mark.parametrize("place", ["train", "validation", "test"])
def test_a_changed_row_changes_the_name_in_every_format_and_split(tmp_path: Path, name: str, place: str) -> None:
    write(tmp_path / "other.jsonl", ROWS)
    write(tmp_path / name, ROWS)
    data = {"train": "other.jsonl", place: name}
    before = folder(tmp_path, **data)
    assert before == folder(tmp_path, **data)
    assert Path(before).parent == Path("runs")
    write(tmp_path / name, [*ROWS[:3], {"text": "text 3", "label": "a"}])
    assert folder(tmp_path, **data) != before
    write(tmp_path / name, ROWS)
    assert folder(tmp_path, **data) == before


def test_a_time_stamp_or_another_place_does_not_change_the_name(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "rows.jsonl", ROWS)
    before = folder(tmp_path / "one", train="rows.jsonl")
    os.utime(tmp_path / "one" / "rows.jsonl", (1, 1))
    assert folder(tmp_path / "one", train="rows.jsonl") == before
    (tmp_path / "one").rename(tmp_path / "two")
    assert folder(tmp_path / "two", train="rows.jsonl") == before


def test_a_file_that_joins_a_pattern_changes_the_name(tmp_path: Path) -> None:
    write(tmp_path / "rows-1.jsonl", ROWS[:2])
    before = folder(tmp_path, train="rows-*.jsonl")
    write(tmp_path / "rows-2.jsonl", ROWS[2:])
    assert folder(tmp_path, train="rows-*.jsonl") != before


@pytest.mark.parametrize(("negatives", "counts"), [(None, False), ({"mine": 2}, True)])
def test_a_corpus_changes_the_name_only_if_negatives_are_mined_in_it(
    tmp_path: Path, negatives: object, counts: bool
) -> None:
    write(tmp_path / "pairs.jsonl", [{"query": f"q {i}", "positive": f"p {i}"} for i in range(4)])
    write(tmp_path / "corpus.jsonl", [{"text": "one"}])
    data = {"train": "pairs.jsonl", "corpus": "corpus.jsonl", **({"negatives": negatives} if negatives else {})}
    recipe = {"recipe_version": 1, "name": "search", "task": "embed", "data": data, "model": {"name": "./base"}}
    (tmp_path / "search.yaml").write_text(json.dumps(recipe))
    before = default_folder(load_recipe(tmp_path / "search.yaml"))
    write(tmp_path / "corpus.jsonl", [{"text": "two"}])
    assert (default_folder(load_recipe(tmp_path / "search.yaml")) != before) is counts


def test_a_missing_file_has_no_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="file not found"):
        folder(tmp_path, train="rows.jsonl")


def test_changes_are_counted_in_lines_where_files_have_lines() -> None:
    before = {"a": Content({"1"}, 10), "b": Content({"1"}, 10), "c": Content({"1"}, None), "d": Content({"1"}, 1)}
    after = {"a": Content({"2"}, 1_220), "b": Content({"2"}, 9), "c": Content({"2"}, None), "e": Content({"1"}, 1)}
    assert [*_list_changes(before, after)] == [
        "a grew by 1,210 lines",
        "b shrank by 1 line",
        "c changed",
        "e is new",
        "d is gone",
    ]
    assert [*_list_changes(before, {**before, "b": Content({"2"}, 10)})] == ["b changed"]
