"""Rows of task classify: labels of any type from any file, bad rows with reasons, and encoded texts."""

import json
import re

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.families import build_bert, build_distilbert, build_roberta
from support.rows import prepare, rows_of, write_jsonl
from support.variants import CLASSIFY
from transformers import AutoTokenizer

from llmtune.data.classify_rows import class_doubts, classified, format_label
from llmtune.data.file_survey import suspicions
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError
from llmtune.recipe.schema import Recipe
from llmtune.tasks.classify import tokenize_texts


def recipe_of(max_length: int = 64, on_overlong: str = "error", **classify: object) -> Recipe:
    content = {"task": "classify", "model": {"name": "x/y"}, "classify": classify}
    content["data"] = {"train": "x.jsonl", "max_length": max_length, "on_overlong": on_overlong}
    return Recipe.model_validate(content)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(build_bert(tmp_path_factory.mktemp("bert")))


@pytest.mark.parametrize(
    ("label", "read"),
    [
        ("red", "red"),
        (" red ", "red"),
        (3, "3"),
        (0, "0"),
        (True, "true"),
        (False, "false"),
        (2.5, 2.5),
        (["b", "a", "b"], ["a", "b"]),
        ([2, 1], ["1", "2"]),
        ([], []),
        ('["b", "a"]', ["a", "b"]),
        ("['b', 'a']", ["a", "b"]),
        ("['it\\'s', \"b\"]", ["b", "it's"]),
        ("[other]", "[other]"),
        ("True", "true"),
        ("FALSE", "false"),
        ([1, 0], ["0", "1"]),
    ],
)
def test_a_label_may_be_text_a_number_a_boolean_or_a_list(label, read):
    assert classified({"text": "a", "label": label}) == {"text": "a", "pair": None, "label": read}


def test_a_second_text_makes_a_pair_and_an_empty_one_is_none():
    assert classified({"text": "a", "pair": "b", "label": "x"})["pair"] == "b"
    assert classified({"text": "a", "pair": "", "label": "x"})["pair"] is None
    assert classified({"text": "a", "pair": None, "label": "x"})["pair"] is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "", "label": "x"}, "empty"),
        ({"text": "  ", "label": "x"}, "empty"),
        ({"text": None, "label": "x"}, "text"),
        ({"text": 7, "label": "x"}, "text"),
        ({"text": "a", "label": None}, "no label"),
        ({"text": "a", "label": ""}, "no label"),
        ({"text": "a", "label": " "}, "no label"),
        ({"text": "a", "label": float("nan")}, "no number"),
        ({"text": "a", "label": {"name": "x"}}, "no label"),
        ({"text": "a", "label": [None]}, "no label"),
        ({"text": "a", "pair": 3, "label": "x"}, "pair"),
        ({"text": "a", "label": [1, 0, 0, 1]}, "labels without names"),
        ({"text": "a", "label": [0, 0]}, "labels without names"),
        ({"text": "a", "label": [1.0, 0.0]}, "labels without names"),
        ({"text": "a", "label": [True, False]}, "labels without names"),
        ({"text": "a", "label": "[1, 0, 0]"}, "labels without names"),
        ({"text": "a", "label": "[True, False]"}, "labels without names"),
        ({"text": "a", "label": ["1", "0", "0"]}, "labels without names"),
        ({"text": "a", "label": "['a' 'b']"}, "label list unreadable"),
        ({"text": "a", "label": "[1 0 0]"}, "label list unreadable"),
        ({"text": "a", "label": "{'a', 'b'}"}, "label list unreadable"),
        ({"text": "a", "label": "('a', 'b')"}, "label list unreadable"),
    ],
)
def test_a_row_without_a_text_or_a_label_is_bad(row, reason):
    with pytest.raises(RowError) as caught:
        classified(row)
    assert reason in f"{caught.value.reason} {caught.value.detail}"


def test_rows_of_a_csv_file_are_read_with_their_pairs_and_lists(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,pair,label\n"one, two",three,1\nfour,,0\nfive,six,"[""a"", ""b""]"\n')
    rows = sorted(rows_of(prepare(tmp_path, str(path), task="classify")), key=lambda row: row["text"])
    assert rows == [
        {"text": "five", "pair": "six", "label": ["a", "b"]},
        {"text": "four", "pair": None, "label": "0"},
        {"text": "one, two", "pair": "three", "label": "1"},
    ]


def test_a_class_is_its_number_in_the_order_of_the_labels(tokenizer):
    rows = [{"text": "red cat", "pair": None, "label": name} for name in ("b", "a", "c")]
    encoded = CLASSIFY.encode(rows, tokenizer, recipe_of(kind="single", labels=["c", "b", "a"]))
    assert [example.class_ids for (example,) in encoded] == [[1], [2], [0]]
    assert [example.supervised for (example,) in encoded] == [1, 1, 1]
    assert all(example.input_ids == tokenizer("red cat").input_ids for (example,) in encoded)


def test_multiple_labels_give_a_number_each_and_may_be_empty(tokenizer):
    rows = [{"text": "red cat", "pair": None, "label": label} for label in (["a", "c"], [])]
    encoded = CLASSIFY.encode(rows, tokenizer, recipe_of(kind="multi", labels=["a", "b", "c"]))
    assert [example.values for (example,) in encoded] == [[1, 0, 1], [0, 0, 0]]


def test_a_number_may_be_written_as_text(tokenizer):
    rows = [{"text": "red cat", "pair": None, "label": label} for label in (2.5, "3", "-1e2")]
    encoded = CLASSIFY.encode(rows, tokenizer, recipe_of(kind="regression"))
    assert [example.values for (example,) in encoded] == [[2.5], [3.0], [-100.0]]


def test_class_weights_are_stored_in_the_examples(tokenizer):
    rows = [{"text": "red cat", "pair": None, "label": label} for label in ("a", "b")]
    recipe = recipe_of(kind="single", labels=["a", "b"], class_weights={"b": 3.0})
    assert [example.weights for (example,) in CLASSIFY.encode(rows, tokenizer, recipe)] == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("classify", "label", "reason"),
    [
        ({"kind": "single", "labels": ["a", "b"]}, "c", "label unknown: 'c' is none of a, b"),
        ({"kind": "single", "labels": ["a", "b"]}, ["a", "b"], "2 labels, but"),
        ({"kind": "single", "labels": ["a", "b"]}, [], "0 labels, but"),
        ({"kind": "multi", "labels": ["a", "b"]}, ["a", "c"], "label unknown: 'c'"),
        ({"kind": "regression"}, "much", "no number: the label is 'much'"),
        ({"kind": "regression"}, "nan", "no number"),
        ({"kind": "regression"}, "inf", "no number"),
        ({"kind": "regression"}, ["a"], "no number"),
    ],
)
def test_an_unknown_label_is_reported_and_other_rows_are_kept(tokenizer, classify, label, reason):
    good = {"single": "a", "multi": ["a"], "regression": 1.0}[classify["kind"]]
    rows = [{"text": "red cat", "pair": None, "label": value} for value in (good, label, good)]
    before, bad, after = CLASSIFY.encode(rows, tokenizer, recipe_of(**classify))
    assert bad.startswith(reason)
    assert before == after
    assert before[0].input_ids


def test_a_long_text_is_reported_or_truncated(tokenizer):
    row = {"text": "red cat blue dog " * 10, "pair": "green fish", "label": "a"}
    refused = CLASSIFY.encode([row], tokenizer, recipe_of(12, kind="single", labels=["a", "b"]))
    assert "tokens" in refused[0]
    recipe = recipe_of(12, "truncate", kind="single", labels=["a", "b"])
    ((example,),) = CLASSIFY.encode([row], tokenizer, recipe)
    wanted = tokenizer(row["text"], row["pair"], truncation=True, max_length=12)
    assert (example.input_ids, example.token_type_ids) == (wanted.input_ids, wanted.token_type_ids)
    assert len(example.input_ids) == 12


def test_the_second_text_of_a_pair_has_another_kind_of_token(tokenizer):
    row = {"text": "red cat", "pair": "blue dog", "label": None}
    (read,) = tokenize_texts([row], tokenizer)
    wanted = tokenizer("red cat", "blue dog")
    assert read.input_ids == wanted.input_ids
    assert read.token_type_ids == wanted.token_type_ids
    assert set(read.token_type_ids) == {0, 1}


@pytest.mark.parametrize("build", [build_bert, build_distilbert, build_roberta])
def test_the_encoding_of_a_row_does_not_depend_on_its_neighbours(tmp_path, build):
    tokenizer = AutoTokenizer.from_pretrained(build(tmp_path))
    rows = [
        {"text": "red cat", "pair": None},
        {"text": "red cat", "pair": "blue dog"},
        {"text": "one two three", "pair": None},
        {"text": "a", "pair": "quick fox"},
    ]
    together = tokenize_texts(rows, tokenizer)
    assert together == [tokenize_texts([row], tokenizer)[0] for row in rows]
    assert together[0].input_ids == tokenizer("red cat").input_ids
    assert together[1].input_ids == tokenizer("red cat", "blue dog").input_ids
    assert tokenize_texts([], tokenizer) == []


@pytest.mark.parametrize(
    ("labels", "kind", "doubt"),
    [
        (["a|b", "a", "b|c"], "auto", "read as one each: 'a|b', 'b|c'"),
        (["a, b", "a", "c, b"], "auto", "read as one each: 'a, b', 'c, b'"),
        (["a;b", "b;c"], "multi", "read as one each"),
        ([["0", "1"], ["0"], []], "multi", "lists of 0 and 1"),
        (["3,5", "4", "2,25"], "auto", "numbers are read as classes.*'2,25', '3,5'"),
        (["1,234", "1.234,5", "12 000"], "auto", "numbers are read as classes"),
        (["12%", "3.5 %", "n/a"], "auto", "numbers are read as classes"),
        (["1,2", "1,3", "2"], "auto", "numbers are read as classes"),
        (["Spam", "spam"], "auto", "several spellings: 'Spam', 'spam'"),
        (["true", "1", "0"], "auto", "several spellings: '1', 'true'"),
        (["2.0", "2", "1"], "single", "several spellings: '2', '2.0'"),
        (["2.0", 2.0], "single", "several spellings: '2', '2.0'"),
        ([["A"], ["a", "b"]], "multi", "several spellings"),
    ],
)
def test_a_doubtful_reading_of_the_labels_is_named(labels, kind, doubt):
    ((sentence, fix),) = class_doubts(labels, kind)
    assert re.search(doubt.replace("|", r"\|"), sentence)
    assert fix.endswith(".")


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["a|b", "a", "b|c"], "single"),
        (["Food, drinks", "Home, garden", "Toys"], "auto"),
        (["news/sport", "news/politics"], "auto"),
        (["3,5", "4"], "single"),
        (["1.2.3", "1.2.4", "10.0"], "auto"),
        (["50%", "none", "unknown"], "auto"),
        (["2024-01", "2024-02", "1-2"], "auto"),
        (["1", "2", "1.5", 3.0], "auto"),
        ([["a"], ["b", "c"], []], "auto"),
        ([["0", "1", "2"], ["1"]], "multi"),
        (["true", "false"], "auto"),
    ],
)
def test_usual_labels_raise_no_doubt(labels, kind):
    assert list(class_doubts(labels, kind)) == []


LABELS = {
    "jsonl": lambda path, rows: write_jsonl(path, rows),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "csv": lambda path, rows: pandas.DataFrame(rows).to_csv(path, index=False),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(
    ("labels", "read"),
    [
        ([["a", "b"], ["c"]], [["a", "b"], ["c"]]),
        ([True, False], ["true", "false"]),
        ([1, 2], ["1", "2"]),
    ],
)
def test_labels_are_the_same_from_every_kind_of_file(tmp_path, kind, labels, read):
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    LABELS[kind](tmp_path / f"rows.{kind}", rows)
    found = sorted(rows_of(prepare(tmp_path, f"rows.{kind}", task="classify")), key=lambda row: row["text"])
    assert [row["label"] for row in found] == read


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("labels", [[[1, 0, 0], [0, 1, 1]], [[True, False], [False, False]]])
def test_a_value_for_each_class_is_refused_from_every_kind_of_file(tmp_path, kind, labels):
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    LABELS[kind](tmp_path / f"rows.{kind}", rows)
    with pytest.raises(DataError, match="labels without names") as caught:
        prepare(tmp_path, f"rows.{kind}", task="classify")
    assert "write the names of the classes that apply" in str(caught.value)


@pytest.mark.parametrize("kind", LABELS)
def test_a_thumb_is_the_same_from_every_kind_of_file(tmp_path, kind):
    rows = [{"prompt": f"Question {good}?", "completion": "Answer", "label": good} for good in (True, False)]
    LABELS[kind](tmp_path / f"rows.{kind}", rows)
    found = rows_of(prepare(tmp_path, f"rows.{kind}", task="preference"))
    assert {row["messages"][0]["content"]: row["good"] for row in found} == {
        "Question True?": True,
        "Question False?": False,
    }


@pytest.mark.parametrize("kind", LABELS)
def test_a_relevance_is_the_same_from_every_kind_of_file(tmp_path, kind):
    rows = [{"query": "q", "passage": f"passage {good}", "relevance": good} for good in (True, False)]
    LABELS[kind](tmp_path / f"rows.{kind}", rows)
    found = rows_of(prepare(tmp_path, f"rows.{kind}", task="rerank"))
    assert {row["passages"][0]: row["relevances"] for row in found} == {"passage True": [1.0], "passage False": [0.0]}


@pytest.mark.parametrize("kind", LABELS)
def test_tags_are_the_same_from_every_kind_of_file_and_numbers_are_refused(tmp_path, kind):
    rows = [{"tokens": ["Ada", "wrote"], "tags": ["B-PERSON", "O"]}, {"tokens": ["She", "did"], "tags": ["O", "O"]}]
    LABELS[kind](tmp_path / f"rows.{kind}", rows)
    found = rows_of(prepare(tmp_path, f"rows.{kind}", task="token-classify"))
    assert sorted(row["tags"] for row in found) == [["B-PERSON", "O"], ["O", "O"]]
    LABELS[kind](tmp_path / f"rows.{kind}", [{"tokens": ["Ada", "wrote"], "tags": [1, 0]}])
    with pytest.raises(DataError, match="not a tag"):
        prepare(tmp_path, f"rows.{kind}", task="token-classify")


def test_the_survey_names_doubtful_labels():
    rows = [("", {"text": str(i), "pair": None, "label": label}) for i, label in enumerate(["a|b", "a", "b|c"])]
    assert any("read as one each: 'a|b', 'b|c'" in line for line in suspicions(rows))


def test_numbers_are_classes_if_the_recipe_says_so(tokenizer):
    rows = [{"text": "red cat", "pair": None, "label": label} for label in (2.0, 1.0, 2.5)]
    encoded = CLASSIFY.encode(rows, tokenizer, recipe_of(kind="single", labels=["1", "2", "2.5"]))
    assert [example.class_ids for (example,) in encoded] == [[1], [0], [2]]


def test_rows_with_doubtful_classes_are_refused_unless_the_recipe_settles_them(tmp_path):
    names = ["a|b", "a", "b|c"]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": str(i), "label": name} for i, name in enumerate(names)])
    rows = prepare(tmp_path, str(path), task="classify")
    with pytest.raises(DataError, match="read as one each"):
        CLASSIFY.infer_labels(recipe_of(), rows, None)
    assert CLASSIFY.infer_labels(recipe_of(kind="single"), rows, None).classify.labels == ("a", "a|b", "b|c")
    assert CLASSIFY.infer_labels(recipe_of(labels=names), rows, None).classify.labels == tuple(names)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (float(np.float32(123456.78)), "123456.78"),
        (float(np.float32(2019.62)), "2019.62"),
        (2019.62, "2019.62"),
        (20231231.0, "20231231"),
        (float(np.float32(0.1)), "0.1"),
        (3.0, "3"),
        (["red", "blue"], "red, blue"),
        (["Paris, France", "red"], '["Paris, France", "red"]'),
        (["Paris, France"], '["Paris, France"]'),
        ([], "(none)"),
    ],
)
def test_a_label_is_written_with_all_digits_and_without_ambiguity(label, text):
    assert format_label(label) == text
