"""Ids of words that are looked up, against the tokenizer's own."""

from __future__ import annotations

import re
import unicodedata
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import train_tokenizer
from tokenizers import Regex, pre_tokenizers
from tokenizers.models import WordLevel

from llmtune.data import word_cache as words

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
OWN = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "").replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+|\p{L}+"
)
KINDS = {
    "gpt2": OWN,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), OWN]),
    "numbers together": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), OWN]),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), LEVEL]),
    "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), LEVEL]),
    "upper and lower case": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CASED), "isolated"), LEVEL]),
}
TEXTS = st.text(st.one_of(st.sampled_from(words.STABLE), st.sampled_from(" \n'stre1²aB.")), max_size=60).filter(
    lambda text: not any(token in text for token in ADDED)
)


def tokenizer_of(kind):
    tokenizer = train_tokenizer(None).backend_tokenizer
    tokenizer.pre_tokenizer = kind
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_words_that_are_looked_up_have_the_ids_of_the_whole_text(kind, texts):
    tokenizer = tokenizer_of(KINDS[kind])
    reader = words.open_words(tokenizer)
    for text in texts * 2:  # the second time they are known
        assert array("i", reader.read(text)).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["дом", "家", "a\x1cb", "e\u0301", "😀", "ſ", "a\u2028b"])
def test_a_text_with_other_characters_is_left_to_the_tokenizer(text):
    assert words.open_words(tokenizer_of(OWN)).read(text) is None


def test_all_characters_that_are_read_are_composed_and_none_is_disputed():
    assert all(unicodedata.is_normalized("NFC", char) for char in words.STABLE)
    assert unicodedata.is_normalized("NFC", words.STABLE)
    assert not any(unicodedata.category(char) == "Cn" for char in words.STABLE)


@pytest.mark.parametrize(
    "other",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "removed"), LEVEL]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{Han}+|\w+"), "isolated"), LEVEL]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), OWN]),
    ],
)
def test_a_tokenizer_that_cuts_otherwise_is_not_read_by_words(other):
    assert words.open_words(tokenizer_of(other)) is None


def test_a_model_that_is_no_plain_bpe_is_not_read_by_words():
    tokenizer = tokenizer_of(OWN)
    tokenizer.model = WordLevel({"a": 0}, unk_token="a")
    assert words.open_words(tokenizer) is None
    tokenizer = tokenizer_of(OWN)
    tokenizer.model.dropout = 0.1
    assert words.open_words(tokenizer) is None


@pytest.mark.parametrize("wrong", [words.GPT2_WORDS.replace("'s|", ""), r"\S+|\s+", words.GPT2_WORDS.replace(" ?", "")])
def test_an_expression_that_finds_other_words_is_told(wrong):
    assert not words.agree(re.compile(words.translate(wrong)), OWN, words.probes())
    assert words.agree(re.compile(words.translate(words.GPT2_WORDS)), OWN, words.probes())


def test_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 10)
    tokenizer = tokenizer_of(OWN)
    reader = words.open_words(tokenizer)
    text = " ".join(f"w{'a' * k}" for k in range(40)) + " " + "long" * 40
    for _ in range(2):
        assert array("i", reader.read(text)).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        assert len(reader._known) <= 10
