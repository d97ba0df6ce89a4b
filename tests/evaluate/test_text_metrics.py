import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_ter
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from llmtune.evaluate.text_metrics import (
    TEXT_MEASURES,
    measure_bleu,
    measure_chrf,
    measure_length_ratio,
    measure_squad,
    measure_ter,
)

REFERENCES = [
    "The cat sat on the mat, and it stayed there.",
    "Ein Satz\nmit zwei Zeilen.",
    "vier",
    "猫が座っている",
    "There is nothing here to see.",
]
TEXTS = ["The cat sat on a mat and it stayed there .", "Zwei Zeilen\nmit einem Satz.", " vier\n", "猫が走っている", ""]
PAIRS = st.lists(st.tuples(st.text("ab .,é\n", max_size=24), st.text("ab .,é\n", max_size=24)), min_size=1, max_size=5)
COUNTS = np.array([[2.0, 0, 1, 3, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_the_mean_f1_of_rouge_score(metric):
    scorer = RougeScorer([metric], use_stemmer=False)
    wanted = np.mean([scorer.score(want, text)[metric].fmeasure for text, want in zip(TEXTS, REFERENCES, strict=True)])
    assert 0 < wanted < 1
    assert TEXT_MEASURES[metric](TEXTS, REFERENCES).value == pytest.approx(wanted, abs=1e-12)


def test_bleu_with_another_tokenizer_is_sacrebleus():
    found = measure_bleu(TEXTS, REFERENCES, tokenize="char")
    assert found.value == BLEU(tokenize="char").corpus_score(TEXTS, [REFERENCES]).score
    assert found.value != measure_bleu(TEXTS, REFERENCES).value
    assert "tok:char" in found.signature


@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_corpus_scores_are_those_of_sacrebleu_for_any_texts(pairs):
    texts, references = [text for text, _ in pairs], [reference for _, reference in pairs]
    assert measure_bleu(texts, references).value == pytest.approx(corpus_bleu(texts, [references]).score, abs=1e-9)
    assert measure_ter(texts, references).value == pytest.approx(corpus_ter(texts, [references]).score, abs=1e-9)
    chrf = CHRF().corpus_score(texts, [references]).score
    assert measure_chrf(texts, references).value == pytest.approx(chrf, abs=1e-9)


def test_the_length_ratio_is_words_by_words_of_all_rows():
    found = measure_length_ratio(["one two", "", "a\tb\nc"], ["one", "one two three", "a b c d"])
    assert found.value == 5 / 8


# Worked by hand from the rules of the official script: lower case, ASCII punctuation out, articles out, words.
SQUAD_CASES = [
    # text, answers, exact match, F1
    ("The Eiffel Tower!", ["Eiffel tower"], 1, 1),
    ("in the tower", ["Eiffel Tower"], 0, 2 * (1 / 2) * (1 / 2) / 1),
    ("tower tower tower", ["tower hill"], 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
    ("U.S.", ["us"], 1, 1),
    ("well-known", ["well known"], 0, 0),
    ("Paris, France", ["London", "Paris", "France Paris"], 0, 1),
    ("", [], 1, 1),
    ("the", [], 1, 1),
    ("Paris", [], 0, 0),
    ("", ["Paris"], 0, 0),
    ("", ["the"], 1, 1),
    ("Paris", ["the", "Paris"], 1, 1),
    ("anthem", ["them"], 0, 0),
    ("“Paris”", ["Paris"], 0, 0),
]


@pytest.mark.parametrize(("text", "answers", "exact", "f1"), SQUAD_CASES)
def test_answers_are_compared_as_the_squad_script_does(text, answers, exact, f1):
    assert measure_squad("exact_match", [text], [answers]).value == exact
    assert measure_squad("f1", [text], [answers]).value == pytest.approx(f1, abs=1e-12)


def test_squad_scores_are_means_over_the_rows_as_shares_of_one():
    texts, answers = [case[0] for case in SQUAD_CASES], [case[1] for case in SQUAD_CASES]
    exact, f1 = measure_squad("exact_match", texts, answers), measure_squad("f1", texts, answers)
    assert exact.value == np.mean([case[2] for case in SQUAD_CASES])
    assert f1.value == pytest.approx(np.mean([case[3] for case in SQUAD_CASES]), abs=1e-12)
    assert exact.right_wrong
    assert not f1.right_wrong
    assert "share of 1" in exact.signature
