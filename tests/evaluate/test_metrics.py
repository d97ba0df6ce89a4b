from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from llmtune.evaluate.metrics import compare, measure_right, measure_texts, measure_tokens

REFERENCES = ["the cat sat on the mat", "Ein Satz\nmit zwei Zeilen.", "vier", "猫が座っている", "only here"]
TEXTS = ["the cat is on a mat", "Zwei Zeilen\nmit einem Satz.", " vier\n", "猫が走っている", ""]


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_the_mean_f1_of_rouge_score(metric):
    scorer = RougeScorer([metric], use_stemmer=False)
    wanted = np.mean([scorer.score(want, text)[metric].fmeasure for text, want in zip(TEXTS, REFERENCES, strict=True)])
    assert 0 < wanted < 1
    assert measure_texts(metric, TEXTS, REFERENCES).value == pytest.approx(wanted, abs=1e-12)


def test_chrf_is_the_corpus_score_of_sacrebleu():
    found = measure_texts("chrf", TEXTS, REFERENCES)
    assert found.value == pytest.approx(CHRF().corpus_score(TEXTS, [REFERENCES]).score, abs=1e-9)
    assert "nc:6" in found.signature


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=5))
def test_chrf_is_the_corpus_score_of_sacrebleu_for_any_texts(pairs):
    texts, references = [text for text, _ in pairs], [reference for _, reference in pairs]
    wanted = CHRF().corpus_score(texts, [references]).score
    assert measure_texts("chrf", texts, references).value == pytest.approx(wanted, abs=1e-9)


def test_exact_match_strips_outer_white_space_and_nothing_else():
    found = measure_texts("exact_match", [" yes\n", "Yes", "yes.", "a  b"], ["yes", "yes", "yes", "a b"])
    assert found.value == 0.25


def test_token_metrics_are_weighted_by_their_denominators():
    nats, correct, tokens, size = map(np.array, ([2.0, 9.0], [1.0, 2.0], [1.0, 3.0], [4.0, 10.0]))
    value = {
        metric: measure_tokens(metric, nats, correct, tokens, size).value
        for metric in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }
    assert value["loss"] == pytest.approx(11 / 4)
    assert value["perplexity"] == pytest.approx(math.exp(11 / 4))
    assert value["bits_per_byte"] == pytest.approx(11 / math.log(2) / 14)
    assert value["accuracy"] == pytest.approx(3 / 4)


def test_a_difference_is_tuned_minus_base():
    base, tuned = measure_right([True, False, False, False], "exact_match"), measure_right([True] * 4, "exact_match")
    assert compare(base, tuned, seed=0).value == 0.75
    assert compare(tuned, base, seed=0).value == -0.75


def test_a_metric_without_rows_is_not_a_number():
    assert math.isnan(measure_texts("chrf", [], []).value)
    assert math.isnan(measure_right([], "exact_match").value)
