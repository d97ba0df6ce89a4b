"""Mined negatives: those of sentence-transformers, never stale or of another split; and the estimate of false ones."""

import html
import json
import shutil
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.families import build_bert
from support.pairs import quiet, recipe_of, run_recipe
from support.rows import write_jsonl
from support.runs import invoke

from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.mining import Pairs, embedder, mine, mining_inputs
from llmtune.recipe.data_section import NegativesSection
from llmtune.recipe.loader import load_recipe
from llmtune.records import ModelRef

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone", "sky")
ROWS = [
    {"query": f"number {i} {THINGS[i % 9]}", "passage": f"The {THINGS[i % 9]} number {i} is red."} for i in range(80)
]
ROWS += [{"query": ROWS[i]["query"], "passage": f"{THINGS[i % 9]} {i}, once more"} for i in (3, 20, 21)]
HELD_OUT = [{"query": f"test {i} {THINGS[i % 9]}", "passage": f"A {THINGS[i % 9]} number {i} is."} for i in range(12)]
QUICK: dict[str, Any] = {
    "generation": {"max_new_tokens": None},
    "train": {"max_steps": 2, "num_train_epochs": None, "batch_size": 8},
}


def data(mine: int = 3, below: float = 0.99, **more: Any) -> dict[str, Any]:
    settings = {"validation": 0, "test": 0.2, "deduplicate": "exact"}
    return {"data": {**settings, "negatives": {"mine": mine, "below": below, **more}}}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bert(tmp_path_factory.mktemp("bert") / "model", **STILL)


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mined")
    run_recipe(folder, bert, ROWS, "embed", **data(), **QUICK)
    return folder / "run"


def rows_of(run: Path, split: str, place: str = "mined") -> list[dict[str, Any]]:
    return [row for _, row in iterate_rows(load_rows(run / "data" / place), split)]


@pytest.mark.parametrize("below", [0.99, 0.9])
def test_sentence_transformers_mines_the_same_negatives(below: float, run: Path, bert: Path, tmp_path: Path) -> None:
    if below != 0.99:
        run_recipe(tmp_path, bert, ROWS, "embed", **data(below=below), **QUICK)
        run = tmp_path / "run"
    rows = rows_of(run, "train")
    pairs = Dataset.from_list([{"query": row["query"], "passage": row["passages"][0]} for row in rows])
    model = SentenceTransformer(str(bert), device="cpu", local_files_only=True)
    margin = round(1 - below, 2)
    mined = mine_hard_negatives(pairs, model, num_negatives=3, relative_margin=margin, verbose=False)
    theirs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in mined:
        theirs[row["query"], row["passage"]].append(row["negative"])
    ours = {(row["query"], row["passages"][0]): row["negatives"] for row in rows}
    assert ours == {key: theirs.get(key, []) for key in ours}
    assert sum(map(len, ours.values())) > 100 or below == 0.9


@pytest.fixture(scope="module")
def corpus_run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a test file, and a corpus that has the passages of its first test rows and others."""
    folder = tmp_path_factory.mktemp("corpus")
    further = [f"A {THINGS[i % 9]} that is number {i}." for i in range(150)]
    (folder / "corpus.txt").write_text("\n".join(further + [row["passage"] for row in HELD_OUT[:6]]))
    write_jsonl(folder / "test.jsonl", HELD_OUT)
    run_recipe(folder, bert, ROWS, "embed", **in_corpus(folder), **QUICK)
    return folder / "run"


def in_corpus(folder: Path, test: str = "test.jsonl") -> dict[str, Any]:
    sections = data()
    sections["data"] |= {"test": str(folder / test), "corpus": str(folder / "corpus.txt")}
    return sections


def test_a_corpus_is_searched_as_sentence_transformers_does(corpus_run: Path, bert: Path) -> None:
    rows = rows_of(corpus_run, "train")
    pairs = Dataset.from_list([{"query": row["query"], "passage": row["passages"][0]} for row in rows])
    corpus = (corpus_run.parent / "corpus.txt").read_text().splitlines()
    model = SentenceTransformer(str(bert), device="cpu", local_files_only=True)
    settings = {"num_negatives": 3, "relative_margin": 0.01, "verbose": False}
    theirs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in mine_hard_negatives(pairs, model, corpus=corpus, **settings):
        theirs[row["query"], row["passage"]].append(row["negative"])
    ours = {(row["query"], row["passages"][0]): row["negatives"] for row in rows}
    assert ours == {key: theirs.get(key, []) for key in ours}
    mined = {negative for row in rows for negative in row["negatives"]}
    assert mined & {*corpus}
    assert mined - {*corpus}


def test_the_report_says_how_much_was_searched_and_found(corpus_run: Path) -> None:
    mined = json.loads((corpus_run / "report.json").read_text("utf-8"))["data"]["mined"]
    train, test = rows_of(corpus_run, "train"), rows_of(corpus_run, "test")
    corpus = {*(corpus_run.parent / "corpus.txt").read_text().splitlines()}
    searched = corpus | {passage for row in train for passage in row["passages"]}
    by_query = {row["query"]: row["negatives"] for row in train}
    assert mined["searched"] == {"train": len(searched)}
    assert mined["without"] == sum(not negatives for negatives in by_query.values())
    right = {passage for row in test for passage in row["passages"]}
    negatives = {negative for found in by_query.values() for negative in found}
    assert mined["test_passages"] == {"all": 12, "searched": 6, "mined": len(right & negatives)}
    mean = sum(map(len, by_query.values())) / len(by_query)
    for name in ("report.md", "report.html"):
        text = html.unescape((corpus_run / name).read_text("utf-8"))
        assert f"{len(searched)} (train)" in text
        assert f"{mean:.1f} per query on average" in text
        assert f"{mined['without']} have none" in text
        assert "Of 12 right passages of test queries, 6 were searched" in text


def test_which_passages_are_right_for_test_queries_changes_no_negative(corpus_run: Path, bert: Path) -> None:
    """Leaving them out would tell the model which passages of the corpus are answers."""
    folder = corpus_run.parent
    passages = [row["passage"] for row in HELD_OUT]
    other = [{**row, "passage": passages[i - 5]} for i, row in enumerate(HELD_OUT)]
    write_jsonl(folder / "other.jsonl", other)
    run = folder / "other"
    path = recipe_of(folder / "again", bert, ROWS, "embed", **in_corpus(folder, "other.jsonl"), **QUICK)
    assert invoke("prepare", path, "--out", run).exit_code == 0
    assert rows_of(run, "train") == rows_of(corpus_run, "train")
    assert rows_of(run, "test") != rows_of(corpus_run, "test")


def test_another_corpus_to_mine_in_is_another_run(corpus_run: Path) -> None:
    recipe = str(corpus_run.parent / "recipe.yaml")
    other = [f"data.corpus={corpus_run.parent / 'test.jsonl'}"]
    hashes = {load_recipe(recipe, sets).fingerprint for sets in ([], other)}
    assert len(hashes) == 2
    unmined = {load_recipe(recipe, ["data.negatives=null", *sets]).fingerprint for sets in ([], other)}
    assert len(unmined) == 1


def test_negatives_are_mined_among_training_passages_only(run: Path) -> None:
    train, test = rows_of(run, "train"), rows_of(run, "test")
    passages = {passage for row in train for passage in row["passages"]}
    assert {negative for row in train for negative in row["negatives"]} <= passages
    assert test == rows_of(run, "test", "rows")
    assert not any(row["negatives"] for row in rows_of(run, "train", "rows")), "the prepared rows are unchanged"


def test_the_report_says_what_was_mined_and_how_many_negatives_look_right(run: Path) -> None:
    found = json.loads((run / "report.json").read_text("utf-8"))["data"]
    train, mined, surveyed = rows_of(run, "train"), found["mined"], found["surveyed"]
    assert mined["queries"] == len({row["query"] for row in train})
    first = {row["query"]: row["negatives"] for row in train}
    assert mined["negatives"] == sum(map(len, first.values()))
    assert mined["short"] == sum(len(negatives) < 3 for negatives in first.values())
    assert mined["skipped"] > 0
    assert mined["example"]["negative_score"] > 0.99 * mined["example"]["passage_score"]
    kinds = surveyed["kinds"]
    assert kinds["mined, and given in the rows"]["nearer"] == 0, "mined ones are farther than the passage"
    assert kinds["other rows’ passages"]["pairs"] > len(train) ** 2 * 0.9
    assert kinds["other rows’ passages"]["near"] >= kinds["other rows’ passages"]["nearer"] > 0
    text = (run / "report.md").read_text("utf-8")
    assert "Likely false negatives" in text
    assert surveyed["example"]["negative"] in text


def test_mined_negatives_are_never_stale(bert: Path, tmp_path: Path) -> None:
    """They are mined again if the rows, the model's files or their own files change, and else reused."""
    model, out = Path(shutil.copytree(bert, tmp_path / "model")), tmp_path / "run"

    def mined_again(rows: list[dict[str, str]] = ROWS) -> bool:
        before = json.loads((out / "run.json").read_text())["steps"]["mine"]["started"] if out.exists() else 0
        path = recipe_of(tmp_path, model, rows, "embed", **data(), **QUICK)
        done = invoke("prepare", path, "--out", out)
        assert done.exit_code == 0, done.output
        return bool(json.loads((out / "run.json").read_text())["steps"]["mine"]["started"] != before)

    assert mined_again()
    first = rows_of(out, "train")
    assert not mined_again()
    (out / "data/mined/train.rows.arrow").write_bytes(b"damaged")
    assert mined_again()
    assert rows_of(out, "train") == first
    assert mined_again(ROWS[:-1])
    shutil.rmtree(model)
    build_bert(model, **STILL, initializer_range=0.3)
    assert mined_again(ROWS[:-1])
    assert rows_of(out, "train") != first


@pytest.mark.parametrize(
    "changed",
    [
        "data.negatives.mine=4",
        "data.negatives.below=0.5",
        "embed.query_prompt='Find: '",
        "embed.passage_prompt='Found: '",
        "embed.pooling=cls",
        "data.max_length=16",
        "model.dtype=bfloat16",
    ],
)
def test_every_setting_that_changes_mined_negatives_is_in_their_hash(changed: str, run: Path, bert: Path) -> None:
    rows, path = load_rows(run / "data/rows"), str(run.parent / "recipe.yaml")
    base = ModelRef("base", bert, None, "hash of the files")
    hashes = [
        mining_inputs(rows, *embedder(load_recipe(path, sets).recipe, base, quiet(), True)) for sets in ([], [changed])
    ]
    assert hashes[0] != hashes[1]


def test_negatives_go_if_the_recipe_mines_none(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("prepare", recipe_of(tmp_path, bert, ROWS, "embed", **data(), **QUICK), "--out", out).exit_code == 0
    without = recipe_of(tmp_path, bert, ROWS, "embed", data={"validation": 0, "test": 0.2}, **QUICK)
    assert invoke("prepare", without, "--out", out, "--fresh").exit_code == 0
    assert not (out / "data/mined").exists()


def test_a_reranker_learns_from_pairs_with_mined_negatives(bert: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, bert, ROWS, "rerank", **QUICK, data={"validation": 0, "test": 0.2})
    refused = invoke("run", path, "--out", tmp_path / "without")
    assert (refused.exit_code, "data.negatives: {mine: 4}" in refused.output) == (3, True)
    report = run_recipe(tmp_path, bert, ROWS, "rerank", **data(mine=2), **QUICK)
    for split in ("train", "test"):
        rows = rows_of(tmp_path / "run", split)
        right = {passage for row in rows for passage in row["passages"][:1]}
        queries: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            queries[row["query"]] += row["relevances"]
            assert set(row["passages"]) <= right, "passages of the same split"
        assert all(relevances.count(0.0) <= 2 for relevances in queries.values())
        assert sum(relevances.count(0.0) == 2 for relevances in queries.values()) > len(queries) / 2
    assert "passages mined with" in report["evaluation"]["signatures"]["ndcg@10"]
    merged = invoke("deploy", "merge", tmp_path / "run")
    assert merged.exit_code == 0, merged.output
    again = recipe_of(tmp_path / "again", tmp_path / "run/merged", ROWS, "rerank", **data(mine=2), **QUICK)
    refused = invoke("run", again, "--out", tmp_path / "again/run")
    assert (refused.exit_code, "data.negatives.model" in refused.output) == (2, True), refused.output
    done = invoke("run", again, "--out", tmp_path / "named", "--set", f"data.negatives.model={bert}")
    assert done.exit_code == 0, done.output


def test_a_reranker_gets_negatives_of_a_corpus_in_each_split(bert: Path, tmp_path: Path) -> None:
    corpus = [f"A {THINGS[i % 9]} that is number {i}." for i in range(150)]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))
    sections = data(mine=2)
    sections["data"]["corpus"] = str(tmp_path / "corpus.txt")
    report = run_recipe(tmp_path, bert, ROWS, "rerank", **sections, **QUICK)
    for split in ("train", "test"):
        rows = rows_of(tmp_path / "run", split)
        pairs = [pair for row in rows for pair in zip(row["passages"], row["relevances"], strict=True)]
        assert {passage for passage, relevance in pairs if not relevance} & {*corpus}
        assert not {passage for passage, relevance in pairs if relevance} & {*corpus}
    assert report["data"]["mined"]["searched"]["test"] > 150
    assert "in data.corpus too" in report["evaluation"]["signatures"]["ndcg@10"]


def test_any_number_of_scores_at_a_time_gives_the_same_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = Pairs([*"abcdef"], [*"abcdef"], [*map(str, range(40))], [[i] for i in range(6)], [[]] * 6, [None] * 6)
    section = NegativesSection(mine=3, below=0.9)
    at_once = mine(vectors[:6], vectors, pairs, section)
    monkeypatch.setattr("llmtune.mining.SCORES", 100)
    assert mine(vectors[:6], vectors, pairs, section) == at_once


def test_classes_have_no_negatives_to_mine(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": row["passage"], "label": THINGS[i % 9]} for i, row in enumerate(ROWS)]
    done = invoke("prepare", recipe_of(tmp_path, bert, rows, "embed", **data(), **QUICK), "--out", tmp_path / "run")
    assert (done.exit_code, "rows with labels have no negatives to mine" in done.output) == (2, True), done.output


def test_a_query_keeps_its_own_passages_and_its_own_text_out_of_its_negatives() -> None:
    passages = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = Pairs(["a", "b"], ["1", "2"], list("abcdefghijkl"), [[0], [1, 2]], [[3], []], [None, 4])
    found = mine(passages[[0, 1]], passages, pairs, NegativesSection(mine=12, below=1.0))
    assert set(found.negatives[0]) == set(range(12)) - {0, 3}
    lowest = float(passages[1] @ passages[2])
    nearer = {i for i in range(12) if float(passages[1] @ passages[i]) > lowest}
    assert set(found.negatives[1]) == set(range(12)) - {1, 2, 4} - nearer


@pytest.mark.parametrize("columns", [("negative_1", "negative_2"), ("neg_2", "neg_1")])
def test_numbered_negatives_are_read_as_sentence_transformers_writes_them(
    columns: tuple[str, str], bert: Path, tmp_path: Path
) -> None:
    rows = [
        {"anchor": row["query"], "positive": row["passage"], columns[0]: "One red fox.", columns[1]: f"Stone {i}."}
        for i, row in enumerate(ROWS)
    ]
    for task, key in (("embed", "negatives"), ("rerank", "passages")):
        path = recipe_of(tmp_path / task, bert, rows, task, data={"validation": 0, "test": 0.2}, **QUICK)
        done = invoke("prepare", path, "--out", tmp_path / task / "run")
        assert done.exit_code == 0, done.output
        first = rows_of(tmp_path / task / "run", "train", "rows")[0]
        ordered = first[key][-2:] if columns[0].endswith("1") else first[key][-1:-3:-1]
        assert ordered[0] == "One red fox."
        assert ordered[1].startswith("Stone")
        assert "not used" not in done.output


def test_ragged_numbered_negatives_lose_only_the_missing_ones(bert: Path, tmp_path: Path) -> None:
    rows = [{**row, "negative_1": "One."} | ({"negative_2": "Two."} if i % 2 else {}) for i, row in enumerate(ROWS)]
    path = recipe_of(tmp_path, bert, rows, "embed", data={"validation": 0, "test": 0.2}, **QUICK)
    assert invoke("prepare", path, "--out", tmp_path / "run").exit_code == 0
    counts = {len(row["negatives"]) for row in rows_of(tmp_path / "run", "train", "rows")}
    assert counts == {1, 2}
