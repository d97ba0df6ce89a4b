"""Splitting answers into their parts during generation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import train_tokenizer
from support.templates import HERMES, recipe_for, tokenizer_with

from llmtune.data.answer_format import TOOL
from llmtune.data.answer_parser import parse_answer
from llmtune.data.chat_template import read_template
from llmtune.serve.answer_stream import AnswerStream, Delta, Detokenizer

TOKENIZER = tokenizer_with(HERMES)
TEMPLATE = read_template(TOKENIZER, recipe_for())
CALLS = (
    '<think>\nOne, then the other.\n</think>\n\nI look it up.\n<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n'
    '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
)


def stream_of(text, **options):
    """Feed an answer token by token; return the stream and its output for each token."""
    stream = AnswerStream(TOKENIZER, TEMPLATE.end_ids, TEMPLATE, **options)
    deltas = [stream.add([token]) for token in TOKENIZER(text)["input_ids"]]
    return stream, [*deltas, stream.close()]


@pytest.mark.parametrize(
    "text",
    [
        "Blue.<|im_end|>",
        "  Blue,\n\nand  more ",
        "1 < 2 <thin air> <tool",
        CALLS,
        "<think>\nnever ending",
        "blue<|im_start|> sky<|im_end|>",
    ],
)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_the_streamed_parts_equal_those_of_the_complete_answer(text, tools):
    stream, deltas = stream_of(text, tools=tools)
    parsed = parse_answer(TOKENIZER(text)["input_ids"], TEMPLATE, tools)
    assert bool(parsed.tool_calls) == (tools is not None and text == CALLS)
    assert (stream.content, stream.reasoning, tuple(stream.tool_calls)) == (
        parsed.text,
        parsed.reasoning or "",
        parsed.tool_calls,
    )
    assert "".join(delta.content for delta in deltas) == stream.content
    assert "".join(delta.reasoning for delta in deltas) == stream.reasoning
    assert [call for delta in deltas for call in delta.tool_calls] == stream.tool_calls


def test_each_part_is_streamed_as_soon_as_it_is_final():
    _, deltas = stream_of(CALLS, tools=[TOOL])
    kinds = ["reasoning" if d.reasoning else "content" if d.content else "call" for d in deltas if d]
    assert sorted(kinds, key=["reasoning", "content", "call"].index) == kinds
    assert kinds.count("reasoning") > 3
    assert kinds.count("content") > 3
    assert kinds[-2:] == ["call", "call"]
    assert deltas[-1] == Delta()


@pytest.mark.parametrize("call", ['{"name": "sum", "arg', '{"name": "sum", "arguments": {"a": NaN}}'])
def test_a_call_that_cannot_be_read_becomes_text(call):
    stream, _ = stream_of(f"Look: <tool_call>{call}</tool_call> and more", tools=[TOOL])
    assert stream.tool_calls == []
    assert stream.content.startswith(f"Look: {call}")
    assert stream.content.endswith("and more")


# The text of it

LETTER_TOKENIZER = train_tokenizer()
LETTERS = "añ日🐈 .xyz"


def decode(ids):
    return LETTER_TOKENIZER.decode(ids, skip_special_tokens=True)


@given(
    st.text(LETTERS, max_size=30),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_pieces_join_to_the_text_before_the_first_stop_for_any_chunking(text, stops, sizes):
    ids = LETTER_TOKENIZER(text, add_special_tokens=False)["input_ids"]
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
    ids = LETTER_TOKENIZER("🐈", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    detokenizer = Detokenizer(decode)
    assert [detokenizer.add([token]) for token in ids] == [""] * (len(ids) - 1) + ["🐈"]
