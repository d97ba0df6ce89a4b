"""Answers as models write them, in their parts."""

from __future__ import annotations

import pytest
from support.templates import EMPTY_THOUGHTS, recipe_for, tokenizer_with

from llmtune.data.answer_parser import ParsedAnswer, parse_answer
from llmtune.data.chat_template import read_template

CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("four<|im_end|>", ParsedAnswer("four")),
        ("four", ParsedAnswer("four", complete=False)),
        ("<think>\nhm\n</think>\n\nfour<|im_end|>\n", ParsedAnswer("four", "hm")),
        ("<think>\n\n</think>\n\nfour<|im_end|>", ParsedAnswer("four")),
        ("<think>\nhm", ParsedAnswer("", "hm", complete=False)),
        (
            'so\n<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
            ParsedAnswer("so", tool_calls=(CALL,)),
        ),
    ],
)
def test_an_answer_is_read_into_thoughts_calls_and_text(written, parts):
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    template = read_template(tokenizer, recipe_for())
    assert parse_answer(written, template) == parts
    assert parse_answer(tokenizer(written)["input_ids"], template) == parts


def test_special_tokens_that_mark_nothing_are_no_text_and_text_that_looks_like_them_is():
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    template = read_template(tokenizer, recipe_for())
    assert parse_answer(tokenizer("blue<|im_start|> sky<pad>")["input_ids"], template).text == "blue sky"
    spelled = tokenizer("it ends by <|im_end|> alone", split_special_tokens=True)["input_ids"]
    assert parse_answer(spelled, template) == ParsedAnswer("it ends by <|im_end|> alone", complete=False)
