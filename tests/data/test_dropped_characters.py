"""Characters that a tokenizer drops or joins: learned, refused with the reason, or counted, in every kind of row."""

import json

import pytest
from support.encoding import learned
from support.templates import CHATML, conversation, recipe_for, tokenizer_with
from tokenizers import normalizers

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_template import render_prompt
from llmtune.data.completion_encoding import encode_completion, prompt_ids
from llmtune.data.data_report import find_vanishing

TEXTS = ["\0", "\0\0", "a\0b", "\x07", "\u0301", "cafe\u0301", "a\u200b", "\ufe0f"]
DROPPED = "the tokenizer drops every character of"


def with_normalizer(normalizer):
    tokenizer = tokenizer_with(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_control_characters_and_combining_marks_are_learned_in_every_place(text):
    tokenizer = tokenizer_with(CHATML)
    rows = [conversation(text, "yes"), conversation("so", text), conversation(text, text)]
    for row, encoded in zip(rows, encode_chat(rows, tokenizer, recipe_for()), strict=True):
        answer = row["messages"][1]["content"]
        assert not isinstance(encoded, str), encoded
        assert learned(encoded[0], tokenizer) == [f"{answer}<|im_end|>"]
        assert encoded[0].target_bytes == len(answer.encode())
    rows = [{"prompt": "say ", "completion": text}]
    ((example,),) = encode_completion(rows, tokenizer, recipe_for("completion"))
    assert learned(example, tokenizer) == [f"{text}<|im_end|>"]


@pytest.mark.parametrize("normalizer", [normalizers.BertNormalizer(), normalizers.Nmt()], ids=["bert", "nmt"])
def test_a_target_that_the_tokenizer_drops_is_refused_and_a_prompt_is_not(normalizer):
    tokenizer = with_normalizer(normalizer)
    rows = [{"prompt": "say ", "completion": "\x07"}, {"prompt": "", "completion": "\x07\x07"}]
    assert encode_completion(rows, tokenizer, recipe_for("completion")) == [
        f"{DROPPED} the completion",
        f"{DROPPED} the text",
    ]
    assert encode_chat([conversation("so", "\x07")], tokenizer, recipe_for()) == [f"{DROPPED} an answer"]
    (encoded,) = encode_chat([conversation("\x07", "yes")], tokenizer, recipe_for())
    assert learned(encoded[0], tokenizer) == ["yes<|im_end|>"]
    assert prompt_ids("\x07", tokenizer) == prompt_ids("", tokenizer)
    ids = render_prompt([{"role": "user", "content": "\x07"}], tokenizer, recipe_for())
    assert tokenizer.decode(ids).split() == ["<|im_start|>user", "<|im_end|>", "<|im_start|>assistant"]


def test_a_final_combining_mark_counts_as_learned_bytes():
    tokenizer = with_normalizer(normalizers.NFC())
    rows = [{"prompt": "", "completion": text} for text in ("cafe\u0301", "x e\u0301", "e\u0301 x")]
    encoded = encode_completion(rows, tokenizer, recipe_for("completion"))
    assert [example.target_bytes for (example,) in encoded] == [len("afe\u0301".encode()), len(" e\u0301".encode()), 2]


def test_combining_marks_are_counted_unless_the_tokenizer_strips_accents_on_purpose():
    rows = [json.dumps({"text": "cafe\u0301"}), json.dumps({"text": "a\x07"}, ensure_ascii=False)]
    without_marks = with_normalizer(normalizers.Replace("\u0301", ""))
    assert find_vanishing(rows, without_marks) == {"\u0301": 1}
    assert find_vanishing(rows, with_normalizer(normalizers.BertNormalizer())) == {"\x07": 1}
    assert find_vanishing(rows, tokenizer_with(CHATML)) == {}
