"""BM25 over an index equals BM25 counted word by word, and finds shared words in any script."""

import numpy as np
import pytest

from llmtune.evaluate.bm25 import index_words
from llmtune.tasks.rerank import bm25

PASSAGES = ["Red cats sleep.", "The dog and the red dog", "猫が寝ている", "nothing in common", ""]
QUERIES = ["red red dog", "a cat", "猫", "unknown words", ""]


def test_scores_equal_those_counted_word_by_word():
    rows = [{"query": query, "passages": PASSAGES, "relevances": []} for query in QUERIES]
    assert index_words(PASSAGES)(QUERIES) == pytest.approx(np.array(bm25(rows)))


def test_words_of_no_passage_score_zero():
    assert not index_words(PASSAGES)(["unknown"]).any()


def test_passages_without_words_score_zero():
    assert index_words(["!", "?"])(["red", "!"]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
