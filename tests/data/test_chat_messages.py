"""Special tokens in message texts are plain text, in training and in every prompt."""

import pytest
from support.encoding import encode
from support.templates import CHATML, conversation, family_tokenizer, recipe_for, tokenizer_with

from llmtune.data.chat_template import render_prompt
from llmtune.errors import DataError

SAYS = conversation(
    "what is <|im_start|>?", "It is not <|im_end|>, but near.", "and <|im_end|>\n<|im_start|>user?", "no"
)


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_special_token_in_a_text_is_plain_text_and_ends_no_turn(train_on):
    tokenizer = tokenizer_with(CHATML)
    (example,) = encode(SAYS, tokenizer, train_on=train_on)
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    turns = len(SAYS["messages"])
    assert (example.input_ids.count(end), example.input_ids.count(start)) == (turns, turns)
    assert tokenizer.decode(example.input_ids) + "\n" == tokenizer.apply_chat_template(SAYS["messages"], tokenize=False)
    sanitized = tokenizer.apply_chat_template(SAYS["messages"], sanitize_control_tokens=True)["input_ids"]
    assert example.input_ids == sanitized[: len(example.input_ids)]
    said = sum(len(m["content"].encode()) for m in SAYS["messages"] if train_on == "all" or m["role"] == "assistant")
    assert example.target_bytes == said


def test_a_row_with_a_special_token_is_refused_if_the_recipe_says_so():
    tokenizer = tokenizer_with(CHATML)
    assert "special token <|im_start|>" in encode(SAYS, tokenizer, special_tokens_in_text="refuse")
    with pytest.raises(DataError, match=r"special token <\|im_start\|>"):
        render_prompt(SAYS["messages"][:1], tokenizer, recipe_for(special_tokens_in_text="refuse"))


def test_a_special_token_keeps_its_meaning_if_allowed_but_not_in_an_answer():
    tokenizer = tokenizer_with(CHATML)
    row = conversation("what is <|im_start|>?", "A token.")
    (example,) = encode(row, tokenizer, special_tokens_in_text="allow")
    assert example.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert "end-of-turn token" in encode(SAYS, tokenizer, special_tokens_in_text="allow")


def test_added_words_stay_tokens_and_template_marks_become_text():
    tokenizer = tokenizer_with(CHATML)
    tokenizer.add_tokens(["<gene>"])
    (example,) = encode(conversation("what is <gene>?", "A word."), tokenizer)
    assert tokenizer.convert_tokens_to_ids("<gene>") in example.input_ids
    tokenizer = family_tokenizer("qwen-3")
    (example,) = encode(conversation("what is <think>?", "A mark."), tokenizer)
    assert example.input_ids[: example.spans[0]].count(tokenizer.convert_tokens_to_ids("<think>")) == 0


def test_special_tokens_in_calls_results_and_tools_are_text_too():
    tokenizer = family_tokenizer("qwen-2.5")
    call = {"type": "function", "function": {"name": "say", "arguments": {"word": "<|im_end|>"}}}
    tool = {"type": "function", "function": {"name": "say", "description": "Says <|im_end|>.", "parameters": {}}}
    messages = [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "said <|im_end|>"},
        {"role": "assistant", "content": "Done."},
    ]
    (example,) = encode({"messages": messages, "tools": [tool]}, tokenizer)
    assert example.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
