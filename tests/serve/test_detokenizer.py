from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import train_tokenizer

from llmtune.serve.detokenizer import Detokenizer

TOKENIZER = train_tokenizer()
LETTERS = "añ日🐈 .xyz"


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@given(
    st.text(LETTERS, max_size=30),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_pieces_join_to_the_text_before_the_first_stop_whatever_they_come_in(text, stops, sizes):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    detokenizer, pieces, at = Detokenizer(decode, stops), [], 0
    for size in sizes * (len(ids) + 1):
        pieces.append(detokenizer.add(ids[at : at + size]))
        at += size
    pieces.append(detokenizer.close())
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.stopped == bool(ends)


def test_half_a_character_is_never_returned():
    ids = TOKENIZER("🐈", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    detokenizer = Detokenizer(decode)
    assert [detokenizer.add([token]) for token in ids] == [""] * (len(ids) - 1) + ["🐈"]


@pytest.mark.parametrize("together", [1, 50])
def test_what_may_begin_a_stop_waits_and_tokens_behind_one_are_not_counted(together):
    ids = TOKENIZER("one END two three", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(decode, ["END"])
    pieces = [detokenizer.add(ids[at : at + together]) for at in range(0, len(ids), together)]
    assert "".join(pieces) == "one "
    assert decode(detokenizer.ids) == "one END"
