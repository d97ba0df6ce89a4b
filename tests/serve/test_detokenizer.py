from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import train_tokenizer

from llmtune.serve.detokenizer import Wording

TOKENIZER = train_tokenizer()


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def told(wording, ids, sizes):
    pieces, at = [], 0
    while at < len(ids):
        size = next(sizes)
        pieces.append(wording.take(ids[at : at + size]))
        at += size
    return [*pieces, wording.close()]


@given(
    st.text("añ日🐈 .xyz", max_size=30),
    st.lists(st.text("añ日🐈 .xyz", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_pieces_join_to_the_text_before_the_first_stop_whatever_they_come_in(text, stops, sizes):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    wording = Wording(decode, stops)
    pieces = told(wording, ids, iter(sizes * (len(ids) + 1)))
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    wanted = text[: min(found)[1]] if found else text
    assert "".join(pieces) == wording.text == wanted
    assert wording.stopped == bool(found)


def test_half_a_character_is_never_told():
    ids = TOKENIZER("🐈", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    wording = Wording(decode)
    assert [wording.take([token]) for token in ids] == [""] * (len(ids) - 1) + ["🐈"]


def test_what_may_be_the_beginning_of_a_stop_waits():
    ids = TOKENIZER("one END two", add_special_tokens=False)["input_ids"]
    wording = Wording(decode, ["END"])
    seen = ""
    for token in ids:
        seen += wording.take([token])
        assert "E" not in seen
    assert seen == "one "


@pytest.mark.parametrize("together", [1, 50])
def test_tokens_behind_a_stop_are_not_counted(together):
    ids = TOKENIZER("one END two three", add_special_tokens=False)["input_ids"]
    wording = Wording(decode, ["END"])
    for at in range(0, len(ids), together):
        wording.take(ids[at : at + together])
    assert decode(wording.ids) == "one END"
