"""BM25 over an index equals BM25 counted word by word, and finds shared words in any script."""

import math

import numpy as np
import pytest

from llmtune.evaluate.bm25 import index_words, words

PASSAGES = ["Red cats sleep.", "The dog and the red dog", "猫が寝ている", "nothing in common", ""]
QUERIES = ["red red dog", "a cat", "猫", "unknown words", ""]


def test_scores_equal_those_counted_word_by_word():
    split = [words(passage) for passage in PASSAGES]
    mean = sum(map(len, split)) / len(split)

    def weigh(word, passage):
        holders, count = sum(word in other for other in split), passage.count(word)
        rarity = math.log(1 + (len(split) - holders + 0.5) / (holders + 0.5))
        return rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(passage) / mean))

    expected = [[sum(weigh(word, passage) for word in words(query)) for passage in split] for query in QUERIES]
    assert index_words(PASSAGES)(QUERIES) == pytest.approx(np.array(expected))


def test_words_of_no_passage_score_zero():
    assert not index_words(PASSAGES)(["unknown"]).any()


def test_passages_without_words_score_zero():
    assert index_words(["!", "?"])(["red", "!"]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
