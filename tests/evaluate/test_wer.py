import math

import jiwer
import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from llmtune.evaluate.text_metrics import NORMALISERS, make_normaliser, measure_cer, measure_wer

REFERENCES = [
    "He hoped there would be stew for dinner.",
    "Turnips — and carrots",
    "Ça, c'est l'été",
    "go  on",
    "two dogs",
]
TEXTS = ["he hoped there'd be stew for the dinner", "turnips and carrot's", "Ca c'est été", "go on on on", ""]
METRICS = {"wer": (measure_wer, jiwer.wer), "cer": (measure_cer, jiwer.cer)}


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_error_rate_is_that_of_jiwer_over_the_normalised_texts(metric, normaliser):
    build, reference = METRICS[metric]
    clean = [[make_normaliser(normaliser)(text) for text in side] for side in (REFERENCES, TEXTS)]
    found = build(TEXTS, REFERENCES, normaliser)
    assert 0 < found.value < 1
    assert found.value == pytest.approx(reference(*clean), abs=1e-12)
    assert f"normaliser {normaliser}" in found.signature
    assert "jiwer 4." in found.signature


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_written_where_nothing_was_said_counts_as_errors(metric):
    build, _ = METRICS[metric]
    found = build(["a b", "x", ""], ["a b", "...", "!"])
    assert found.sums_NK.tolist() == [[0, 2 if metric == "wer" else 3], [1, 0], [0, 0]]
    assert found.value == 1 / (2 if metric == "wer" else 3)
    assert "where the reference is empty" in found.signature


@pytest.mark.parametrize("metric", METRICS)
def test_an_error_rate_without_reference_words_is_not_a_number(metric):
    build, _ = METRICS[metric]
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


def test_the_normaliser_of_whisper_is_the_one_for_the_language():
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
        measure_wer(TEXTS, REFERENCES, "whisper", language, spellings).signature
        for language, spellings in (("de", None), ("en", None), ("en", {"colour": "color"}))
    ]
    assert "whisper (basic)" in signatures[0]
    assert "not unified" in signatures[1]
    assert "whisper (English)," in signatures[2]
