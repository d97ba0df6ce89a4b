"""Rows of task rerank: pairs, lists and negatives become one form; bad rows with reasons. Queries stay in one split."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.rows import rows_of, write_jsonl

from llmtune.data.column_mapping import rename
from llmtune.data.file_survey import list_readings, survey_files, suspicions
from llmtune.data.preparation import prepare_rows
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import detect_format, map_columns, parse_row
from llmtune.data.search_rows import (
    given_passages,
    ranked_list,
    ranked_negatives,
    ranked_objects,
    ranked_pair,
    ranked_positive,
)
from llmtune.errors import DataError
from llmtune.recipe.loader import load_recipe
from llmtune.records import Rows
from llmtune.tasks.rerank import Rerank


@pytest.mark.parametrize(
    ("relevance", "read"), [(1, 1), (0, 0), (True, 1), (False, 0), ("1", 1), ("no", 0), (2.5, 2.5), ("0.25", 0.25)]
)
def test_a_relevance_may_be_a_number_a_boolean_or_their_text(relevance: object, read: float) -> None:
    row = ranked_pair({"query": "q", "passage": "p", "relevance": relevance})
    assert row == {"query": "q", "passages": ["p"], "relevances": [float(read)]}


def test_lists_and_negatives_become_the_same_row_as_relevances() -> None:
    expected = {"query": "q", "passages": ["a", "b", "c"], "relevances": [1.0, 0.0, 0.0]}
    assert ranked_list({"query": "q", "passages": '["a", "b", "c"]', "relevances": "[1, 0, 0]"}) == expected
    assert ranked_negatives({"query": "q", "passage": "a", "negatives": ["b", "c"]}) == expected
    titled = ranked_negatives({"query": "q", "passage": [{"title": "T", "text": "a"}], "negatives": None})
    assert titled == {"query": "q", "passages": ["T\na"], "relevances": [1.0]}


@pytest.mark.parametrize(
    ("parse", "row", "words"),
    [
        (ranked_pair, {"passage": "p", "relevance": "maybe"}, "'maybe'; it must be a number"),
        (ranked_pair, {"passage": "p", "relevance": None}, "null; it must be a number"),
        (ranked_pair, {"passage": "p", "relevance": -1}, "0 is irrelevant"),
        (ranked_pair, {"passage": "p", "relevance": float("nan")}, "0 is irrelevant"),
        (ranked_pair, {"passage": " ", "relevance": 1}, "'passage' is empty"),
        (ranked_pair, {"passage": 7, "relevance": 1}, "must be text"),
        (ranked_list, {"passages": ["a"], "relevances": [1, 0]}, "1 passages and 2 relevances"),
        (ranked_list, {"passages": [], "relevances": []}, "no passages"),
        (ranked_negatives, {"passage": None, "negatives": []}, "no passages"),
        (ranked_negatives, {"passage": "p", "negatives": ["n", ""]}, "'negatives' is empty"),
        (ranked_positive, {"passage": ["p", "n"], "labels": [1, 0]}, "the row has 'labels'; map its list"),
        (ranked_list, {"passages": ["p", None], "relevances": [1, 0]}, "'passages' is empty"),
        (ranked_list, {"passages": ["p", "p"], "relevances": [1, 0]}, "'p' has the relevances 1 and 0"),
        (ranked_negatives, {"passage": "p", "negatives": ["n", "p"]}, "'p' has the relevances 1 and 0"),
        (ranked_objects, {"judged_passages": ["p"]}, "must be an object with one of text"),
        (ranked_objects, {"judged_passages": [{"text": "p"}]}, "one of relevance"),
        (ranked_objects, {"judged_passages": []}, "no passages"),
        (ranked_objects, {"judged_passages": {"text": ["a", "b"], "label": [1]}}, "have 1 to 2 values"),
    ],
)
def test_a_bad_row_says_why(parse: Any, row: dict[str, object], words: str) -> None:
    with pytest.raises(RowError, match=words):
        parse({"query": "q", **row})


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("question", "document", "label"), "query-passage-relevance"),
        (("query", "text", "score"), "query-passage-relevance"),
        (("query", "pos", "neg"), "query-passage-negatives"),
        (("query", "docs", "labels"), "query-passages"),
        (("query", "answer", "labels"), "query-passages"),  # `mine_hard_negatives` of sentence-transformers
    ],
)
def test_files_of_other_tools_are_read_by_their_usual_names(names: tuple[str, ...], name: str) -> None:
    assert detect_format([dict.fromkeys(names, "1")], "rerank", {}, None, "x.jsonl").name == name


def test_rows_without_relevance_are_refused_with_the_forms_of_rows() -> None:
    with pytest.raises(DataError, match=r"query-passage-relevance(.|\n)*\"relevances\": \[1, 0\]"):
        detect_format([{"query": "q", "body": "p"}], "rerank", {}, None, "x.jsonl")


@pytest.mark.parametrize(
    "passages",
    [
        [{"text": "a", "score": 1.0}, {"text": "b", "score": 0.0}],
        [{"passage_text": "a", "is_selected": 1, "url": "u"}, {"passage_text": "b", "is_selected": 0, "url": "v"}],
        {"is_selected": [1, 0], "passage_text": ["a", "b"], "url": ["u", "v"]},  # MS MARCO on the hub
    ],
)
def test_passages_may_be_objects_with_their_relevance(passages: object) -> None:
    row = {"query_id": 1, "query": "q", "answers": ["x"], "passages": passages}
    row_format = detect_format([row], "rerank", {}, None, "x.jsonl")
    assert row_format.name == "query-judged-passages"
    parsed = parse_row(rename(row, map_columns(row_format, [row], "rerank", {})), row_format, "rerank")
    assert parsed == {"query": "q", "passages": ["a", "b"], "relevances": [1.0, 0.0]}


def test_copies_of_a_passage_in_a_row_count_once() -> None:
    row = {"query": "q", "passages": ["a", "b", "b"], "relevances": [1, 0, 0]}
    assert ranked_list(row) == {"query": "q", "passages": ["a", "b"], "relevances": [1.0, 0.0]}


def test_only_passages_with_several_relevances_for_one_query_are_suspicious() -> None:
    one = {"query": "q", "passages": ["a", "b"], "relevances": [1.0, 0.0]}
    other = {"query": "q", "passages": ["b", "c"], "relevances": [1.0, 0.0]}
    assert suspicions([("r:1", one), ("r:2", {**other, "passages": ["d", "c"]})]) == []
    (found,) = suspicions([("r:1", one), ("r:2", other)])
    assert found == "passages with different relevances for the same query in different rows: 1, first in r:1 and r:2"


def test_given_passages_are_a_json_list_or_lines() -> None:
    assert given_passages('["a", "b\\nc"]') == ["a", "b\nc"]
    assert given_passages("a\n\nb") == ["a", "b"]
    assert given_passages(None) == []
    assert given_passages('[{"title": "T", "text": "a"}, {"passage_text": "b"}, 7]') == ["T\na", "b", "7"]


ROWS = [
    {"query": f"query number {i}", "passage": f"the passage {j} is shared by every query", "relevance": int(i % 5 == j)}
    for i in range(60)
    for j in range(5)
]


def split_texts(rows: Rows) -> list[set[str]]:
    return [{row["query"] for row in rows_of(rows, split)} for split in ("train", "validation", "test")]


def prepared(folder: Path, task: str = "rerank", **data: object) -> Rows:
    sections = {"task": task, "model": {"name": "x/y"}, "data": {"train": "rows.jsonl", **data}}
    (folder / "r.yaml").write_text(json.dumps(sections))
    recipe = load_recipe(str(folder / "r.yaml")).recipe
    return prepare_rows(recipe, folder / "rows", Console(quiet=True))


def test_the_rows_of_a_query_are_in_one_split_without_a_word_in_the_recipe(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    rows = prepared(tmp_path, test=0.2)
    queries = split_texts(rows)
    assert sum(map(len, queries)) == len(set.union(*queries)) == 60
    assert sum(rows.counts.values()) == len(ROWS)  # passages that many queries share are no near duplicates


@pytest.mark.parametrize("more", [{}, {"negatives": ["another passage"]}, {"score": 0.5}])
def test_embed_keeps_the_rows_of_a_query_in_one_split_too(more: dict[str, object], tmp_path: Path) -> None:
    rows = [{"query": row["query"], "passage": f"{row['passage']} {row['query']}", **more} for row in ROWS]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    sides = split_texts(prepared(tmp_path, task="embed", test=0.2, deduplicate="exact"))
    assert sum(map(len, sides)) == len(set.union(*sides)) == 60


def test_classes_of_one_text_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"text": f"text number {i}", "label": f"class {j}"} for i in range(60) for j in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    sides = split_texts(prepared(tmp_path, task="embed", test=0.2, deduplicate="none"))
    assert sum(map(len, sides)) == len(set.union(*sides)) == 60


def test_an_irrelevant_passage_that_is_almost_right_is_no_duplicate_of_the_right_one(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    copies = [{"query": f"q {i}", "passage": f"{words} {i} end {j}", "relevance": j} for i in range(4) for j in (0, 1)]
    write_jsonl(tmp_path / "rows.jsonl", copies)
    assert prepared(tmp_path, test=0.25, validation=0).dropped == {}
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "relevance": 1} for row in copies])
    assert prepared(tmp_path, test=0.25, validation=0).dropped == {"near duplicate": 4}


def test_training_rows_with_a_query_of_the_test_file_are_dropped(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [{**row, "passage": f"{row['passage']} again"} for row in ROWS[:10]])
    rows = prepared(tmp_path, test="test.jsonl")
    assert rows.dropped == {"same query as a test row": 10}
    assert rows.counts["test"] == 10


def test_queries_for_which_any_order_is_right_are_counted(tmp_path: Path) -> None:
    asked = {"a": [1], "b": [1, 1], "c": [1, 0], "d": [0]}
    lists = [
        {"query": query, "passages": [f"{query} {i}" for i in range(len(relevances))], "relevances": relevances}
        for query, relevances in asked.items()
    ]
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", lists)
    rows = prepared(tmp_path, test="test.jsonl", validation=0)
    notes = Rerank().row_notes(rows, "test", load_recipe("rerank").recipe)["queries"]
    assert "1 without a relevant passage are left out" in notes
    assert "2 have only equally relevant passages, so any order is right" in notes


def test_the_recipe_and_its_resolved_form_name_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"{{task: rerank, name: r, data: {{train: {tmp_path}/x.jsonl}}, model: {{name: x/y}}}}"
    )
    loaded = load_recipe(str(tmp_path / "r.yaml"))
    assert loaded.recipe.data.split_by == "query"
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert (again.fingerprint, again.recipe) == (loaded.fingerprint, loaded.recipe)
    whole = load_recipe(str(tmp_path / "r.yaml"), ["data.validation=0", "data.test=0"]).recipe
    assert whole.data.split_by is None


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"query": "q", "passage": "p"}, "embed"),
        ({"anchor": "q", "positive": "p", "negative": "n"}, "embed"),
        ({"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}, "embed"),
        ({"query": "q", "passage": "p", "label": 0}, "rerank"),
    ],
)
def test_pairs_and_triplets_are_for_embed_and_graded_passages_for_rerank(row, task, tmp_path):
    rows = [
        {name: f"{value} {i}" if isinstance(value, str) else i % 2 for name, value in row.items()} for i in range(20)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list_readings(survey_files(str(file)))[0].task == task
