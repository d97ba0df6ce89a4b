"""Ids joined from pieces, compared with those of complete texts."""

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import CHATML
from support.templates import OWN_TOKENS, tokenizer_with
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtune.data.tokenization import (
    decode,
    decode_shortened,
    tokenize_by_pieces,
    tokenize_each,
    tokenize_with_borders,
)

TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *OWN_TOKENS]
PARTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([*TOKENS, "<|im_", "end|>", "user\n", " the sky", "'s", "12", " Of", ". so", "\u0301"]),
)
BATCH = st.lists(st.lists(PARTS, max_size=8).map("".join), min_size=16, max_size=24)
ASSORTED = [f"<|im_start|>user\nquestion {k}<|im_end|>\n<|im_start|>assistant\n家 {k}" for k in range(20)]
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
KINDS = {
    "words": None,
    "several cuts": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.Split(Regex(r"\s+"), "isolated"), LEVEL]
    ),
    "space before": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "space before each piece": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "none": pre_tokenizers.Metaspace(prepend_scheme="never"),
}


def tokenizer_of(kind):
    tokenizer = tokenizer_with(CHATML)
    if KINDS[kind] is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = KINDS[kind]
    return tokenizer


def ids_by_pieces(tokenizer, texts):
    found = tokenize_by_pieces(tokenizer, texts, [()] * len(texts))
    return None if found is None else [ids for ids, _ in found]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(texts=BATCH)
def test_joined_pieces_have_the_ids_of_the_text(kind, texts):
    tokenizer = tokenizer_of(kind)
    assert ids_by_pieces(tokenizer, texts) == tokenize_each(tokenizer, texts)


@pytest.mark.parametrize("kind", [*KINDS, "complete texts"])
@settings(max_examples=40, deadline=None)
@given(texts=BATCH, data=st.data())
def test_ids_before_a_border_match_the_text_before_it(kind, texts, data):
    tokenizer = tokenizer_of(kind if kind in KINDS else "words")
    if kind not in KINDS:
        tokenizer.add_tokens([AddedToken("<|own|>", rstrip=True)])
    borders = [sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4))) for text in texts]
    for text, places, (ids, counts) in zip(
        texts, borders, tokenize_with_borders(tokenizer, texts, borders), strict=True
    ):
        assert ids == tokenize_each(tokenizer, [text])[0]
        heads = tokenize_each(tokenizer, [text[:place] for place in places]) if places else []
        assert counts == [len(head) if ids[: len(head)] == head else None for head in heads]


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Lowercase(), normalizers.Prepend("▁")])
def test_a_normalised_text_has_the_same_ids(normalizer):
    tokenizer = tokenizer_with(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizer
    texts = [f"{text} e\u0301 É" for text in ASSORTED]
    assert ids_by_pieces(tokenizer, texts) == tokenize_each(tokenizer, texts)


def test_tokens_added_later_are_used():
    tokenizer = tokenizer_with(CHATML)
    before = ids_by_pieces(tokenizer, ASSORTED)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    texts = [text.replace("question", "<|new|>") for text in ASSORTED]
    assert ids_by_pieces(tokenizer, texts) == tokenize_each(tokenizer, texts)
    assert ids_by_pieces(tokenizer, ASSORTED) == before
    assert any(tokenizer.convert_tokens_to_ids("<|new|>") in ids for ids in ids_by_pieces(tokenizer, texts))


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|own|>", rstrip=True),
        AddedToken("<|own|>", lstrip=True),
        AddedToken("<|own|>", single_word=True),
        AddedToken("<|own|>", normalized=True),
    ],
)
def test_a_tokenizer_that_looks_beyond_pieces_gets_complete_texts(token):
    tokenizer = tokenizer_with(CHATML)
    tokenizer.add_tokens([token])
    assert ids_by_pieces(tokenizer, ASSORTED) is None


def test_a_tokenizer_that_marks_the_first_word_gets_complete_texts():
    tokenizer = tokenizer_with(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    assert ids_by_pieces(tokenizer, ASSORTED) is None


def test_settings_of_another_caller_have_no_effect():
    tokenizer = tokenizer_with(CHATML)
    wanted = tokenize_each(tokenizer, ASSORTED)
    tokenizer(ASSORTED, padding=True, truncation=True, max_length=4)
    assert ids_by_pieces(tokenizer, ASSORTED) == wanted


def test_few_texts_go_directly_to_the_tokenizer():
    assert ids_by_pieces(tokenizer_with(CHATML), ASSORTED[:3]) is None


def test_a_tokenizer_whose_pieces_disagree_gets_complete_texts():
    class Cleaning(PreTrainedTokenizerFast):
        def __call__(self, texts, **settings):
            return super().__call__([text.replace("家", "?") for text in texts], **settings)

    tokenizer = Cleaning(tokenizer_object=tokenizer_with(CHATML).backend_tokenizer)
    assert ids_by_pieces(tokenizer, ASSORTED) is None
    tokenizer = Cleaning(tokenizer_object=tokenizer_with(CHATML).backend_tokenizer)
    assert ids_by_pieces(tokenizer, [text.replace("家", "?") for text in ASSORTED]) is not None


@given(
    st.lists(st.tuples(st.sampled_from(["word", "of", "<|endoftext|>", "<|im_end|>"]), st.integers(1, 9)), max_size=9)
)
@settings(deadline=None)
def test_only_runs_of_a_special_token_are_shortened(runs):
    tokenizer = tokenizer_with(CHATML)
    merged = [(text, sum(count for _, count in group)) for text, group in groupby(runs, key=lambda run: run[0])]
    shown = ""
    for text, count in merged:
        special = text in tokenizer.get_added_vocab() and count > 3
        shown += f"{text} [... {count - 1} more ...] " if special else text * count
    ids = tokenizer("".join(text * count for text, count in runs), add_special_tokens=False)["input_ids"]
    assert decode_shortened(ids, tokenizer) == shown
    assert "more" in shown or decode(tokenizer, ids) == shown


def test_a_long_text_with_a_picture_is_not_cut_inside_its_tokens():
    tokenizer = tokenizer_with(CHATML)
    ids = tokenizer("Look: " + "<|im_end|>" * 4096 + "What is it?", add_special_tokens=False)["input_ids"]
    assert decode_shortened(ids, tokenizer) == "Look: <|im_end|> [... 4,095 more ...] What is it?"
