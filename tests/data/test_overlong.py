"""Rows longer than `data.max_length`, under each choice of `data.on_overlong`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.encoding import complete, encode, learned, with_start_token
from support.models import CHATML, train_tokenizer
from support.templates import conversation, recipe_for, tokenizer_with

from llmtune.data.overlong import Lost
from llmtune.tasks.registry import get_task

CHAT = conversation("one two", "three", "four five", "six")


def long_chat(exchanges, words=12):
    return conversation(
        *(text for i in range(exchanges) for text in (f"question {i} " + "cat " * words, f"answer {i}"))
    )


def test_a_conversation_of_exactly_max_length_stays():
    tokenizer = tokenizer_with(CHATML)
    length = len(encode(CHAT, tokenizer)[0].input_ids)
    assert isinstance(encode(CHAT, tokenizer, max_length=length), list)
    assert (
        encode(CHAT, tokenizer, max_length=length - 1) == f"too long: {length} tokens, data.max_length is {length - 1}"
    )


@pytest.mark.parametrize("choice", ["error", "drop"])
def test_the_error_for_an_overlong_conversation_gives_its_length(choice):
    result = encode(long_chat(9), tokenizer_with(CHATML), max_length=60, on_overlong=choice)
    assert result.startswith("too long: ")


def test_truncate_keeps_the_system_message_and_the_last_answers():
    tokenizer = tokenizer_with(CHATML)
    row = {"messages": [{"role": "system", "content": "be kind"}, *long_chat(6)["messages"]]}
    (example,) = encode(row, tokenizer, max_length=120, on_overlong="truncate")
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nquestion")
    assert learned(example, tokenizer)[-1] == "answer 5<|im_end|>"
    assert len(example.input_ids) <= 120
    assert "answer 0" not in text
    (whole,) = encode(row, tokenizer)
    assert example.lost == Lost(
        tokens=len(whole.input_ids) - len(example.input_ids),
        answers=len(whole.spans) // 2 - len(example.spans) // 2,
        supervised=whole.supervised - example.supervised,
    )
    assert example.lost.answers > 0


def test_truncate_cuts_the_start_of_a_single_question():
    tokenizer = tokenizer_with(CHATML)
    (example,) = encode(long_chat(1, words=200), tokenizer, max_length=50, on_overlong="truncate")
    assert 45 <= len(example.input_ids) <= 50
    assert learned(example, tokenizer) == ["answer 0<|im_end|>"]
    assert "question" not in tokenizer.decode(example.input_ids)


def test_an_exchange_that_does_not_fit_alone_cannot_be_split():
    row = long_chat(2, words=200)
    result = encode(row, tokenizer_with(CHATML), max_length=50, on_overlong="split")
    assert "one exchange alone does not fit" in result


def test_truncate_cuts_a_prompt_after_the_start_token():
    tokenizer = with_start_token(train_tokenizer(CHATML))
    whole = complete("cat " * 40, "dog bird", tokenizer)[0]
    (example,) = complete("cat " * 40, "dog bird", tokenizer, max_length=20, on_overlong="truncate")
    assert len(example.input_ids) == 20
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids[1:] == whole.input_ids[-19:]
    assert learned(example, tokenizer) == learned(whole, tokenizer)
    assert example.target_bytes == whole.target_bytes


@pytest.mark.parametrize(
    ("prompt", "says"), [("", "plain text has no prompt"), ("cat", "does not fit with any of its prompt")]
)
def test_truncate_never_cuts_a_completion(prompt, says):
    result = complete(prompt, " dog" * 60, train_tokenizer(None), max_length=20, on_overlong="truncate")
    assert result.startswith("too long: ")
    assert says in result


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("prompt", ["", "The sky is"])
@pytest.mark.parametrize("more", [(), ("<pad>",)], ids=["one", "two"])
def test_every_piece_starts_as_the_tokenizer_starts_a_text(more, prompt, packing):
    tokenizer = with_start_token(train_tokenizer(CHATML), *more)
    start = tokenizer("")["input_ids"]
    pieces = complete(prompt, "the quick brown fox " * 20, tokenizer, max_length=16, on_overlong="split")
    assert len(pieces) > 3
    recipe = recipe_for("completion", packing=packing)
    batch = get_task("completion").collator(tokenizer, recipe)(pieces, 0)
    ids = batch["input_ids"]
    documents = ids[0].tensor_split(batch["cu_seq_lens_q"][1:-1].tolist()) if packing else ids
    assert [document[: len(start)].tolist() for document in documents] == [start] * len(pieces)
    assert not set(start) & set(batch["targets_S"].tolist())
    assert all(piece.spans[0] > len(start) for piece in pieces[1:]), "predicted from the text, not from its start"


def test_a_start_that_leaves_no_room_for_text_cannot_be_split():
    tokenizer = with_start_token(train_tokenizer(CHATML), *["<pad>"] * 7)
    result = complete("", "the quick brown fox " * 20, tokenizer, max_length=8, on_overlong="split")
    assert result.startswith("too long: ")


@pytest.mark.parametrize("start", [False, True])
@settings(max_examples=30, deadline=None)
@given(prompt=st.sampled_from(["", "The sky is"]), text=st.text(min_size=40, max_size=200).filter(str.strip))
def test_windows_predict_each_token_once_and_count_each_byte_once(start, prompt, text):
    tokenizer = train_tokenizer(None)
    tokenizer = with_start_token(tokenizer) if start else tokenizer
    (whole,) = complete(prompt, text, tokenizer, max_length=100_000)
    windows = complete(prompt, text, tokenizer, max_length=12, on_overlong="split")
    assert all(len(window.input_ids) <= 12 for window in windows)
    predicted = [token for window in windows for token in window.input_ids[window.spans[0] : window.spans[1]]]
    assert predicted == whole.input_ids[whole.spans[0] :]
    assert sum(window.target_bytes for window in windows) == whole.target_bytes
    assert all(window.spans[0] >= 1 for window in windows)


def test_a_prompt_that_does_not_fit_cannot_be_split():
    result = complete("cat " * 40, "dog", train_tokenizer(None), max_length=20, on_overlong="split")
    assert "its prompt alone does not fit" in result
