"""Texts that differ in white space or Unicode composition are one text, and a passage of several rows counts once."""

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.families import build_bert
from support.pairs import recipe_of
from support.rows import write_jsonl
from transformers import AutoTokenizer

from llmtune.data.corpus import load_corpus, save_corpus
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_text import text_key
from llmtune.data.search_rows import embed_from_pair, ranked_list
from llmtune.evaluate.evaluated_task import Corpus, EvalPrediction
from llmtune.mining import add_negatives, collect_pairs
from llmtune.recipe.data_section import DataSection
from llmtune.recipe.loader import load_recipe
from llmtune.tasks.embed import Embed
from llmtune.tasks.rerank import Rerank, bm25

VARIANTS = (
    "The café is red.",
    "The café is red. ",
    " The café\tis  red.\n",
    "The café is\r\nred.",
    "The cafe\u0301 is red.",
)
"""One text."""
OTHER = "The cafe is red."


def looks_of(text: str, draw: random.Random) -> str:
    """Return a text with other white space and composition."""
    return draw.choice([text, f"{text} ", f"\n{text}", text.replace(" ", "  "), text.replace("é", "e\u0301")])


def embed_row(query: str, *passages: str, negatives: tuple[str, ...] = (), label: str | None = None) -> dict[str, Any]:
    return {"query": query, "passages": [*passages], "negatives": [*negatives], "score": None, "label": label}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"query": "a", "passage": "b"}]
    return load_recipe(str(recipe_of(folder, folder, rows, "embed", generation={"max_new_tokens": None}))).recipe


def test_the_form_of_a_text_ignores_white_space_and_composition_only() -> None:
    assert len({*map(text_key, VARIANTS)}) == 1
    assert len({*map(text_key, (VARIANTS[0], OTHER, "the café is red.", "The café is red"))}) == 4


@pytest.mark.parametrize("metric", ["ndcg@10", "mrr@10", "recall@1", "recall@5", "map"])
def test_a_passage_of_several_triplets_counts_once_as_in_ir_measures(metric: str, recipe: Any) -> None:
    """A perfect ranking of a query with six triplets had recall@1 0.17."""
    names = {"ndcg@10": "nDCG@10", "mrr@10": "RR@10", "recall@1": "R@1", "recall@5": "R@5", "map": "AP"}
    draw, rows, predictions = random.Random(3), [], []
    judged: dict[str, dict[str, int]] = {}
    scored: dict[str, dict[str, float]] = {}
    for query in ("the café one", "two", "three"):
        grades = {f"{query} é {i}": draw.choice([0, 0, 1, 2]) for i in range(12)} | {f"{query} é right": 1}
        scores = {text: draw.random() for text in grades}
        judged[query], scored[query] = grades, scores
        texts = [*grades] + [draw.choice([*grades]) for _ in range(30)]
        for part in range(0, len(texts), 3):
            chosen = [*dict.fromkeys(texts[part : part + 3])]
            relevances = [float(grades[text]) for text in chosen]
            passages = [looks_of(text, draw) for text in chosen]
            rows.append({"query": looks_of(query, draw), "passages": passages, "relevances": relevances})
            predictions.append({"scores": [scores[text] for text in chosen], "ranking": []})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ir_measures
    [expected] = ir_measures.calc_aggregate([ir_measures.parse_measure(names[metric])], judged, scored).values()
    measured = Rerank().compute_metric(metric, EvalPrediction(predictions, rows), recipe)
    assert len(measured.at) == 3
    assert measured.value == pytest.approx(expected, abs=1e-9)


def test_a_perfect_ranking_of_triplets_is_perfect(recipe: Any) -> None:
    rows = [{"query": "q", "passages": ["right", f"wrong {i}"], "relevances": [1.0, 0.0]} for i in range(6)]
    found = EvalPrediction([{"scores": [0.9, 0.1], "ranking": [0, 1]}] * 6, rows)
    for metric in ("recall@1", "mrr@10", "ndcg@10", "map"):
        assert Rerank().compute_metric(metric, found, recipe).value == 1.0


def test_a_passage_that_one_row_calls_relevant_is_relevant(recipe: Any) -> None:
    rows = [{"query": "q", "passages": ["a ", "b"], "relevances": [0.0, 0.0]}]
    rows.append({"query": "q", "passages": ["a"], "relevances": [1.0]})
    found = EvalPrediction([{"scores": [0.9, 0.1], "ranking": [0, 1]}, {"scores": [0.9], "ranking": [0]}], rows)
    assert Rerank().compute_metric("recall@1", found, recipe).value == 1.0


@pytest.mark.parametrize("other", VARIANTS[1:])
def test_searched_passages_of_rows_and_corpus_are_one_passage(other: str, recipe: Any) -> None:
    """White space after a passage halved recall@1."""
    text = VARIANTS[0]
    rows = [embed_row("query", text), embed_row(" query", "far", negatives=("near",)), embed_row("other", other)]
    made = [
        {"query": [1.0, 0.0], "passage": [1.0, 0.0]},
        {"query": [1.0, 0.0], "passage": [0.9, 0.1], "negative": [0.0, 1.0]},
        {"query": [1.0, 0.0], "passage": [1.0, 0.0]},
    ]
    corpus = Corpus([other, f"{other} ", "else"], np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    for searched in (None, corpus):
        measured = Embed().compute_metric("recall@1", EvalPrediction(made, rows, corpus=searched), recipe)
        assert measured.at == (0, 2), "one value per query"
        assert measured.value == pytest.approx((1 / 2 + 1) / 2)
        assert f"searched in {3 if searched is None else 4} passages" in measured.signature


def test_a_text_of_a_class_is_not_found_by_its_copy(recipe: Any) -> None:
    rows = [embed_row(text, label="x") for text in (*VARIANTS, "lone")] + [embed_row("near", label="y")]
    made = [{"query": [1.0, 0.0]}] * len(VARIANTS) + [{"query": [0.0, 1.0]}, {"query": [0.9, 0.1]}]
    measured = Embed().compute_metric("recall@1", EvalPrediction(made, rows), recipe)
    assert (measured.value, measured.at) == (0.0, (0, len(VARIANTS)))


@pytest.mark.parametrize("other", VARIANTS)
def test_rows_name_a_text_once(other: str) -> None:
    assert embed_from_pair({"query": "q", "passage": [VARIANTS[0], other]})["passages"] == [VARIANTS[0]]
    with pytest.raises(RowError, match="a passage is a negative"):
        embed_from_pair({"query": "q", "passage": VARIANTS[0], "negatives": [OTHER, other]})
    row = {"query": "q", "passages": [VARIANTS[0], OTHER, other], "relevances": [1, 0, 1]}
    assert ranked_list(row)["passages"] == [VARIANTS[0], OTHER]
    with pytest.raises(RowError, match="two relevances"):
        ranked_list({**row, "relevances": [1, 0, 0]})


def test_a_corpus_has_a_text_once(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "corpus.jsonl", [{"passage": text} for text in (*VARIANTS, OTHER)])
    save_corpus(DataSection(train=(str(file),), corpus=(str(file),)), tmp_path, Console(quiet=True))
    assert load_corpus(tmp_path) == [VARIANTS[0], OTHER]


def test_a_text_of_a_step_is_no_negative_of_its_copy(recipe: Any, tmp_path: Path) -> None:
    processor = AutoTokenizer.from_pretrained(build_bert(tmp_path / "bert"))
    names = [Embed().encode_row(embed_row(f"Why? {text}", text), processor, recipe)[0].text_hashes for text in VARIANTS]
    assert len({*map(tuple, names)}) == 1
    assert len({*names[0]}) == 2


def test_mining_knows_a_right_passage_in_any_look(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [embed_row("query", VARIANTS[0]), embed_row("query ", "second", negatives=("third",))]
    monkeypatch.setattr("llmtune.mining.iterate_rows", lambda rows, split: enumerate(rows))
    pairs = collect_pairs(rows, "train", [*VARIANTS, "second\n", "third ", OTHER])
    assert pairs.passages == [VARIANTS[0], "second", "third", OTHER]
    assert (pairs.queries, pairs.right, pairs.wrong) == (["query"], [[0, 1]], [[2]])
    for row in rows:
        assert json.loads(add_negatives({"query": ["mined"]}, row))["negatives"][-1] == "mined"
    ranked = {"query": "query\n", "passages": ["a"], "relevances": [1.0]}
    assert json.loads(add_negatives({"query": ["mined"]}, ranked))["relevances"] == [1.0, 0.0]


def test_bm25_counts_a_passage_once() -> None:
    once = bm25([{"query": "red cat", "passages": ["the red cat", "the dog"], "relevances": []}])
    again = bm25([{"query": "red cat", "passages": ["the red cat", "the dog", "the red  cat\n"], "relevances": []}])
    assert again[0][:2] == pytest.approx(once[0])
    assert math.isclose(again[0][2], again[0][0])
