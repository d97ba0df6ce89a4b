"""Rows of task classify: labels of any type from any file, bad rows with reasons, and encoded texts."""

import pytest
from support.families import build_bert, build_distilbert, build_roberta
from support.rows import prepare, rows_of
from support.variants import CLASSIFY
from transformers import AutoTokenizer

from llmtune.data.rejected_rows import RowError
from llmtune.data.task_rows import classified
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
