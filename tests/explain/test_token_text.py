from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import train_tokenizer
from transformers import AutoTokenizer

from llmtune.explain.token_text import LONGEST, WORD, Token, name_tokens, token_label

TOKENIZER = train_tokenizer()


def read(built, family: str):
    with warnings.catch_warnings(action="ignore"):
        return AutoTokenizer.from_pretrained(str(built(family)))


def named(tokenizer, text: str) -> list[Token]:
    return name_tokens(tokenizer, tokenizer(text)["input_ids"])


def test_special_tokens_and_continued_words_are_marked_in_each_kind_of_vocabulary(built):
    pieces = {
        "bert": ["[CLS]", "jumps", "·u", "·i", "·t", "?", "[SEP]"],
        "t5": ["jumps", "·u", "·i", "·t", "?", "</s>"],
        "marian": ["j", "·u", "·m", "·p", "·s", "·u", "·i", "·t", "?", "</s>"],
    }
    for family, wanted in pieces.items():
        tokens = named(read(built, family), "jumpsuit?")
        assert [token_label(token) for token in tokens] == wanted
        assert [token.text for token in tokens if token.special] == [w for w in wanted if w[0] in "[<"]


def test_whispers_marks_are_special_and_letters_of_a_speech_model_make_words(built):
    whisper = named(read(built, "whisper"), "blue sky")
    assert [token.text for token in whisper if token.special] == [
        "<|startoftranscript|>",
        "<|notimestamps|>",
        "<|endoftext|>",
    ]
    letters = read(built, "wav2vec2")
    tokens = name_tokens(letters, letters("BLUE SKY")["input_ids"])
    assert [token.text for token in tokens if not token.continues] == ["B", " ", "S"]
    assert not any(token.special for token in tokens)
    assert name_tokens(letters, [letters.pad_token_id])[0].special


def test_an_unknown_word_counts_as_text_not_as_a_special_token(built):
    tokens = named(read(built, "bert"), "日")
    assert [(token.text, token.special) for token in tokens] == [("[CLS]", True), ("[UNK]", False), ("[SEP]", True)]


def test_byte_level_pieces_show_complete_characters_and_bytes_of_others():
    tokens = named(TOKENIZER, "cat é")
    assert "".join(token.text for token in tokens) == "cat <0xC3><0xA9>"
    assert [(token.text, token.continues) for token in tokens[-2:]] == [("<0xC3>", False), ("<0xA9>", True)]


@given(st.text())
def test_every_id_has_a_token_and_together_they_are_the_text(text):
    ids = TOKENIZER(text)["input_ids"]
    tokens = name_tokens(TOKENIZER, ids)
    assert [token.id for token in tokens] == ids
    if text.isascii() and "<0x" not in text:
        assert "".join(token.text for token in tokens) == text


@given(st.text(min_size=1), st.booleans())
def test_a_label_is_one_line_without_reordering_or_hiding_characters(text, continues):
    shown = token_label(Token(1, text, special=False, continues=continues))
    assert len(shown) <= LONGEST + 9
    assert not set(shown) & set("\n\r\t\x00\u202e\u2066\u2069\u200b\ufeff")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" cat", "cat"),
        (" ", "␣"),
        ("\n\n", "⏎⏎"),
        ("שלום", "שלום"),
        (" 日本", "日本"),
        ("\u202eabc", "<U+202E>abc"),
        ("\u0301", "◌\u0301"),
        ("a" * 40, "a" * 15 + "…"),
        ("a" * 14 + "e\u0301bc", "a" * 14 + "…"),
    ],
)
def test_labels(text, shown):
    assert token_label(Token(1, text, special=False, continues=False)) == shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jump suit?", ["jump", "suit"]),
        ("שלום", ["שלום"]),
        ("e\u0301a", ["e\u0301a"]),
        ("日本", []),
        ("don't cats' are", ["don't", "cats", "are"]),
        ("'cats", ["cats"]),
    ],
)
def test_words_end_at_spaces_and_signs_keep_apostrophes_and_ideographs_are_single(text, words):
    assert WORD.findall(text) == words


def test_an_id_beyond_the_vocabulary_is_named_by_its_number():
    (token,) = name_tokens(TOKENIZER, [len(TOKENIZER) + 5])
    assert (token.text, token.special) == (f"<{len(TOKENIZER) + 5}>", True)
