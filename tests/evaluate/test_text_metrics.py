import math

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_ter
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from llmtune.evaluate.text_metrics import (
    NORMALISERS,
    TEXT_MEASURES,
    make_normaliser,
    measure_bleu,
    measure_cer,
    measure_chrf,
    measure_length_ratio,
    measure_squad,
    measure_ter,
    measure_wer,
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


@pytest.mark.promise("metric", "referee", equal="rouge-score, within 1e-12")
@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_the_mean_f1_of_rouge_score(metric):
    scorer = RougeScorer([metric], use_stemmer=False)
    wanted = np.mean([scorer.score(want, text)[metric].fmeasure for text, want in zip(TEXTS, REFERENCES, strict=True)])
    assert 0 < wanted < 1
    assert TEXT_MEASURES[metric](TEXTS, REFERENCES).value == pytest.approx(wanted, abs=1e-12)


def test_bleu_with_another_tokenizer_equals_sacrebleu():
    found = measure_bleu(TEXTS, REFERENCES, tokenize="char")
    assert found.value == BLEU(tokenize="char").corpus_score(TEXTS, [REFERENCES]).score
    assert found.value != measure_bleu(TEXTS, REFERENCES).value
    assert "tok:char" in found.signature


@pytest.mark.promise("metric", "referee", equal="sacrebleu, within 1e-9", place="bleu")
@pytest.mark.promise("metric", "referee", equal="sacrebleu, within 1e-9", place="ter")
@pytest.mark.promise("metric", "referee", equal="sacrebleu, within 1e-9", place="chrf")
@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_corpus_scores_equal_those_of_sacrebleu_for_any_texts(pairs):
    texts, references = [text for text, _ in pairs], [reference for _, reference in pairs]
    assert measure_bleu(texts, references).value == pytest.approx(corpus_bleu(texts, [references]).score, abs=1e-9)
    assert measure_ter(texts, references).value == pytest.approx(corpus_ter(texts, [references]).score, abs=1e-9)
    chrf = CHRF().corpus_score(texts, [references]).score
    assert measure_chrf(texts, references).value == pytest.approx(chrf, abs=1e-9)


@pytest.mark.promise("metric", "referee", equal="words counted by hand", place="length_ratio")
def test_the_length_ratio_is_the_words_of_all_texts_over_the_words_of_all_references():
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


@pytest.mark.promise("metric", "referee", equal="cases of the SQuAD 2.0 script", place="exact_match")
@pytest.mark.promise("metric", "referee", equal="cases of the SQuAD 2.0 script", place="f1")
@pytest.mark.parametrize(("text", "answers", "exact", "f1"), SQUAD_CASES)
def test_answers_are_compared_as_in_the_squad_script(text, answers, exact, f1):
    assert measure_squad("exact_match", [text], [answers]).value == exact
    assert measure_squad("f1", [text], [answers]).value == pytest.approx(f1, abs=1e-12)


def test_squad_scores_are_means_over_the_rows_from_0_to_1():
    texts, answers = [case[0] for case in SQUAD_CASES], [case[1] for case in SQUAD_CASES]
    exact, f1 = measure_squad("exact_match", texts, answers), measure_squad("f1", texts, answers)
    assert exact.value == np.mean([case[2] for case in SQUAD_CASES])
    assert f1.value == pytest.approx(np.mean([case[3] for case in SQUAD_CASES]), abs=1e-12)
    assert exact.right_wrong
    assert not f1.right_wrong
    assert "share of 1" in exact.signature


SPOKEN = [
    "He hoped there would be stew for dinner.",
    "Turnips — and carrots",
    "Ça, c'est l'été",
    "go  on",
    "two dogs",
]
HEARD = ["he hoped there'd be stew for the dinner", "turnips and carrot's", "Ca c'est été", "go on on on", ""]
ERROR_RATES = {"wer": (measure_wer, jiwer.wer), "cer": (measure_cer, jiwer.cer)}


@pytest.mark.promise("metric", "referee", equal="jiwer, within 1e-12")
@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("metric", ERROR_RATES)
def test_the_error_rate_equals_that_of_jiwer_on_normalised_texts(metric, normaliser):
    build, reference = ERROR_RATES[metric]
    clean = [[make_normaliser(normaliser)(text) for text in side] for side in (SPOKEN, HEARD)]
    found = build(HEARD, SPOKEN, normaliser)
    assert 0 < found.value < 1
    assert found.value == pytest.approx(reference(*clean), abs=1e-12)
    assert f"normaliser {normaliser}" in found.signature
    assert "jiwer 4." in found.signature


@pytest.mark.parametrize("metric", ERROR_RATES)
def test_text_for_an_empty_reference_counts_as_errors(metric):
    build, _ = ERROR_RATES[metric]
    found = build(["a b", "x", ""], ["a b", "...", "!"])
    assert found.sums_NK.tolist() == [[0, 2 if metric == "wer" else 3], [1, 0], [0, 0]]
    assert found.value == 1 / (2 if metric == "wer" else 3)
    assert "for an empty reference" in found.signature


@pytest.mark.parametrize("metric", ERROR_RATES)
def test_an_error_rate_without_reference_words_is_nan(metric):
    build, _ = ERROR_RATES[metric]
    assert math.isnan(build([], []).value)
    assert math.isnan(build(["noise"], [""]).value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("It's well-known – isn’t it?", "its well known isnt it"),
        ("ÉTÉ E\u0301te\u0301", "été été"),
        ("¿Qué tal? «Bien»", "qué tal bien"),
        ("猫、犬。", "猫犬"),
        ("हिन्दी।", "हिन्दी"),
        ("3.5 % + $2", "35 + $2"),
        ("…", ""),
    ],
)
def test_the_basic_normaliser_knows_the_punctuation_of_all_scripts(text, wanted):
    assert make_normaliser("basic")(text) == wanted


def test_the_whisper_normaliser_depends_on_the_language():
    text = "Mr. Brown won't read twenty-five books on the colour (really)!"
    spellings = {"colour": "color"}
    wanted = EnglishTextNormalizer(spellings)(text).strip()
    assert (
        make_normaliser("whisper", "en", spellings)(text)
        == make_normaliser("whisper", "English", spellings)(text)
        == wanted
    )
    assert wanted == "mister brown will not read 25 books on the color"
    assert make_normaliser("whisper", "en")(text).endswith("the colour")
    assert make_normaliser("whisper", "fr")(text) == BasicTextNormalizer()(text).strip()


def test_the_signature_says_whether_english_spellings_were_unified():
    signatures = [
        measure_wer(HEARD, SPOKEN, "whisper", language, spellings).signature
        for language, spellings in (("de", None), ("en", None), ("en", {"colour": "color"}))
    ]
    assert "whisper (basic)" in signatures[0]
    assert "not unified" in signatures[1]
    assert "whisper (English)," in signatures[2]


def test_rouge_says_that_it_does_not_read_other_scripts():
    """rouge-score reads a to z and 0 to 9: equal texts in Chinese or Russian have a score of 0."""
    for text in ("猫在沙发上睡觉", "Кошка спит"):
        measured = TEXT_MEASURES["rougeL"]([text], [text])
        assert measured.value == RougeScorer(["rougeL"]).score(text, text)["rougeL"].fmeasure == 0
        assert measured.signature.endswith("most references do not have: use chrf")
        assert TEXT_MEASURES["chrf"]([text], [text]).value == pytest.approx(100)
    assert "chrf" not in TEXT_MEASURES["rougeL"](["der Fuchs"], ["der Fuchs"]).signature
