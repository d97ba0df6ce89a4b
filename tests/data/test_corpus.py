"""`data.corpus`: passages are read from usual files, once each, and a bad share of them is refused."""

import json

import pytest
from rich.console import Console
from support.rows import write_jsonl

from llmtune.data.corpus import load_corpus, read_passages, save_corpus
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.launch.python_api import names_remote
from llmtune.recipe.data_section import DataSection
from llmtune.recipe.loader import load_recipe
from llmtune.store.process_environment import refuse_network

QUIET = Console(quiet=True)


def section(*corpus, **more):
    return DataSection.model_validate({"train": "rows.jsonl", "corpus": list(corpus) or None, **more})


@pytest.mark.parametrize(
    ("name", "content", "passages"),
    [
        ("c.txt", "One passage.\n\n Another. \n", ["One passage.", "Another."]),
        ("c.jsonl", '{"passage": "a"}\n{"passage": "b"}\n{"passage": "a"}\n', ["a", "b"]),
        ("c.jsonl", '{"_id": "1", "title": "T", "text": "a"}\n{"_id": "2", "title": "", "text": "b"}\n', ["T\na", "b"]),
        ("c.csv", "id,document\n1,a\n2,b\n", ["a", "b"]),
    ],
)
def test_a_corpus_is_read_from_usual_files(name, content, passages, tmp_path):
    (tmp_path / name).write_text(content)
    assert save_corpus(section(str(tmp_path / name)), tmp_path, QUIET)
    assert load_corpus(tmp_path) == passages


def test_passages_keep_the_line_separators_of_unicode(tmp_path):
    passages = ["one\u2028line", "next\x85line", "form\x0cfeed"]
    file = write_jsonl(tmp_path / "c.jsonl", [{"passage": passage} for passage in passages])
    save_corpus(section(str(file)), tmp_path, QUIET)
    assert load_corpus(tmp_path) == passages


def test_sources_are_joined_limited_and_mapped(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [{"passage": str(i)} for i in range(5)])
    second = write_jsonl(tmp_path / "second.jsonl", [{"of": {"text": "x"}}])
    sources = [{"path": str(first), "limit": 2}, {"path": str(second), "columns": {"passage": "of.text"}}]
    one = save_corpus(section(*sources), tmp_path, QUIET)
    assert load_corpus(tmp_path) == ["0", "1", "x"]
    second.write_text(json.dumps({"of": {"text": "y"}}))
    assert save_corpus(section(*sources), tmp_path, QUIET) != one
    assert save_corpus(section(), tmp_path, QUIET) == ""
    assert load_corpus(tmp_path) == []


def test_a_limit_counts_the_good_passages_of_all_files_of_a_source(tmp_path):
    write_jsonl(tmp_path / "c" / "a.jsonl", [{"passage": "a"}, {"passage": ""}, {"passage": "b"}])
    write_jsonl(tmp_path / "c" / "b.jsonl", [{"passage": "c"}, {"passage": "d"}])
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    sources = [{"path": str(tmp_path / "c"), "limit": 3}, {"path": str(tmp_path / "lines.txt"), "limit": 2}]
    save_corpus(section(*sources, max_dropped=0.5), tmp_path, QUIET)
    assert load_corpus(tmp_path) == ["a", "b", "c", "one", "two"]


def test_a_corpus_without_the_mapped_column_is_read_by_its_own_names(tmp_path):
    file = write_jsonl(tmp_path / "c.jsonl", [{"text": "a"}])
    save_corpus(section(str(file), columns={"query": "asked", "passage": "found"}), tmp_path, QUIET)
    assert load_corpus(tmp_path) == ["a"]
    mapped = {"path": str(file), "columns": {"passage": "found"}}  # this source's own mapping must fit
    with pytest.raises(DataError, match="passage"):
        save_corpus(section(mapped), tmp_path, QUIET)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"number": 1}\n', "no column for the passages; found number"),
        ('{"passage": ""}\n', "no passages"),
        ('{"passage": "a"}\n{"passage": 3}\n', "1 of 2 passages of data.corpus are bad"),
    ],
)
def test_a_bad_corpus_is_refused_with_the_place(content, words, tmp_path):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(DataError, match=words) as refused:
        save_corpus(section(str(tmp_path / "c.jsonl")), tmp_path, QUIET)
    assert "c.jsonl" in str(refused.value) or "data.corpus" in str(refused.value)


def test_few_bad_passages_are_left_out_and_counted(tmp_path):
    rows = [{"passage": f"passage {i}"} for i in range(40)] + [{"passage": " "}]
    file = write_jsonl(tmp_path / "c.jsonl", rows)
    console = Console(record=True, width=200, quiet=False)
    save_corpus(section(str(file)), tmp_path, console)
    assert "40 different passages of 41; 1 left out" in console.export_text()
    assert len(load_corpus(tmp_path)) == 40


@pytest.mark.parametrize(
    ("recipe", "sets", "what"),
    [
        ("rerank", ["data.corpus=c.jsonl"], "'data.corpus' has no effect with task: rerank"),
        ("embed", ["data.corpus=c.jsonl", "data.test=0"], "'data.corpus' has no effect without test rows"),
        ("embed", ["data.corpus={path: c.jsonl, weight: 2}"], "'data.corpus.0.weight' has no effect in a corpus"),
        ("quickstart", ["data.negatives={mine: 4}"], "'data.negatives' has no effect with task"),
        ("embed", ["data.negatives={mine: 0}"], "data.negatives.mine"),
        ("embed", ["data.negatives={mine: 2, below: 1.5}"], "data.negatives.below"),
    ],
)
def test_a_corpus_or_negatives_without_effect_are_refused(recipe, sets, what):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, sets)
    assert what in str(refused.value)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_corpus_to_mine_in_needs_no_test_rows(task):
    sets = ["data.corpus=c.jsonl", "data.negatives={mine: 4}"]
    assert load_recipe(task, sets).recipe.data.corpus
    assert load_recipe(task, [*sets, "data.test=0", "evaluate.gates=null", "evaluate.metrics=null"]).recipe.data.corpus


def test_passages_of_a_file_need_no_recipe(tmp_path):
    (tmp_path / "p.md").write_text("one\ntwo\n")
    assert read_passages(tmp_path / "p.md") == ["one", "two"]


@pytest.mark.parametrize("key", ["corpus=hub:a/b", "corpus=s3://b/c.txt", "negatives={mine: 2, model: a/b}"])
def test_the_network_is_on_for_a_remote_corpus_or_miner_and_off_if_forbidden(key, tmp_path):
    (tmp_path / "model").mkdir()
    recipe = {"task": "embed", "model": {"name": "./model"}, "data": {"train": "rows.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    alone, remote = (load_recipe(tmp_path / "recipe.yaml", sets).recipe for sets in ([], [f"data.{key}"]))
    assert (names_remote(alone), names_remote(remote)) == (False, True)
    candidates = ["model.name=null", "model.candidates=[./model]"]
    assert not names_remote(load_recipe(tmp_path / "recipe.yaml", candidates).recipe)
    if "s3" in key:  # the others may be in the cache
        with pytest.raises(EnvironmentProblem, match=r"data.corpus: s3://b/c.txt is read over the network"):
            refuse_network(remote, offline=True)
