"""Generated answers parsed into their parts."""

import pytest
from support.templates import EMPTY_THOUGHTS, FAMILY_FILES, family_tokenizer, recipe_for, tokenizer_with

from llmtune.data.answer_format import NAME, QUESTION, TOOL, call_message
from llmtune.data.answer_parser import ParsedAnswer, parse_answer, read_written, response_template
from llmtune.data.chat_template import read_template

CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("four<|im_end|>", ParsedAnswer("four")),
        ("four", ParsedAnswer("four", complete=False)),
        ("<think>\nhm\n</think>\n\nfour<|im_end|>\n", ParsedAnswer("four", "hm")),
        ("<think>\n\n</think>\n\nfour<|im_end|>", ParsedAnswer("four", "")),
        ("<think>\nhm", ParsedAnswer("", "hm", complete=False)),
    ],
)
def test_an_answer_is_parsed_into_thoughts_calls_and_text(written, parts):
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    template = read_template(tokenizer, recipe_for())
    assert parse_answer(written, template) == parts
    assert parse_answer(tokenizer(written)["input_ids"], template) == parts


def test_the_text_as_sampled_keeps_thoughts_marks_and_white_space_without_special_tokens():
    template = read_template(family_tokenizer("qwen-3"), recipe_for())
    call = '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'
    for written in (f"<think>\nhm\n</think>\n\nSo: {call}\n", "<think>\nhm", " four \n", f"{call[:-20]}"):
        ids = template.processor(f"{written}<|im_end|>")["input_ids"]
        assert parse_answer(ids, template, [TOOL]).sampled == parse_answer(ids, template).sampled == written
        assert parse_answer(f"{written}<|im_end|>", template, [TOOL]).sampled == written
    stray = template.processor("blue<|im_start|> sky")["input_ids"]
    assert parse_answer(stray, template).sampled == "blue sky"


def test_an_answer_that_no_template_wrote_is_read_as_a_row():
    assert read_written("<think>hm</think>\nfour ", [CALL]) == ParsedAnswer("four", "hm", (CALL,))
    assert read_written("<think>hm") == ParsedAnswer("<think>hm")
    assert read_written("<think>hm</think>\nfour ").sampled == "<think>hm</think>\nfour "


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_arguments_that_are_no_standard_json_are_no_call(number):
    template = read_template(family_tokenizer("qwen-2.5"), recipe_for())
    written = f'<tool_call>\n{{"name": "sum", "arguments": {{"a": [{number}]}}}}\n</tool_call><|im_end|>'
    read = parse_answer(written, template, [TOOL])
    assert (read.tool_calls, bool(read.error)) == ((), True)


def test_stray_special_tokens_are_removed_and_text_that_looks_like_them_stays():
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    template = read_template(tokenizer, recipe_for())
    assert parse_answer(tokenizer("blue<|im_start|> sky<pad>")["input_ids"], template).text == "blue sky"
    thought = tokenizer("<think>\nblue<|im_start|> sky<pad>\n</think>\n\nfour<|im_end|>")["input_ids"]
    assert parse_answer(thought, template) == ParsedAnswer("four", "blue sky")
    spelled = tokenizer("it ends by <|im_end|> alone", split_special_tokens=True)["input_ids"]
    assert parse_answer(spelled, template) == ParsedAnswer("it ends by <|im_end|> alone", complete=False)


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        (
            'so\n<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
            ParsedAnswer("so", tool_calls=(CALL,)),
        ),
        ('<tool_call>\n{"name": "sum", "arg', ParsedAnswer("", complete=False, error="")),
        ('<tool_call>\n{"arguments": {"a": 1}}\n</tool_call><|im_end|>', ParsedAnswer("", error="")),
        ('<tool_call>\n{"name": "sum", "arguments": [1]}\n</tool_call><|im_end|>', ParsedAnswer("", error="")),
    ],
)
def test_calls_are_parsed_in_the_templates_format_and_malformed_ones_give_a_reason(written, parts):
    template = read_template(family_tokenizer("qwen-2.5"), recipe_for())
    read = parse_answer(written, template, [TOOL])
    if parts.error is None:
        assert read == parts
        return
    assert (read.tool_calls, read.complete, bool(read.error)) == ((), parts.complete, True)
    assert read.text == written.removesuffix("<|im_end|>")


OWN_TAGS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if loop.first and tools %}{{ tools | tojson }}
{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}<do what="{{ c.function.name }}">\
{% for k, v in c.function.arguments.items() %}<with k="{{ k }}">{{ v }}</with>{% endfor %}</do>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_calls_in_tags_of_no_known_family_are_inferred_from_the_template():
    template = read_template(tokenizer_with(OWN_TAGS), recipe_for())
    written = '<do what="sum"><with k="a">1</with><with k="b">two</with></do><|im_end|>'
    (call,) = parse_answer(written, template, [TOOL]).tool_calls
    assert call["function"] == {"name": "sum", "arguments": {"a": "1", "b": "two"}}


LOOKS_LIKE_CALLS = {
    "llama-3": '{"name": "sum", "parameters": {"a": 1}}',
    "qwen-2.5": '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>',
    "chatml": 'So:\n<tool_call>\n{"arguments": {"a": 1}, "name": "sum"}\n</tool_call>',
    "mistral-v3": '[TOOL_CALL] [{"name": "sum", "arguments": {"a": 1}}]',
    "zephyr": '<functioncall> {"name": "sum", "arguments": \'{"a": 1}\'}',
}


@pytest.mark.parametrize(("name", "written"), LOOKS_LIKE_CALLS.items())
def test_an_answer_that_looks_like_a_call_is_text_if_no_tool_is_offered(name, written):
    template = read_template(family_tokenizer(name), recipe_for())
    assert parse_answer(f"{written}{template.facts.end}", template) == ParsedAnswer(written)
    assert parse_answer(f"{written}{template.facts.end}", template, []) == ParsedAnswer(written)


@pytest.mark.parametrize("name", FAMILY_FILES)
def test_a_familys_own_call_is_parsed_only_if_tools_are_offered(name):
    template = read_template(family_tokenizer(name), recipe_for())
    if template.facts.calls.field is None:
        pytest.skip("it writes no calls")
    (message,) = template.prepare([call_message()])
    prompt = template.render([QUESTION], [TOOL], answer_next=True).removesuffix(template.facts.thoughts.opener)
    written = template.render([QUESTION, message], [TOOL]).removeprefix(prompt)
    offered, alone = (parse_answer(written, template, tools, prompt) for tools in ([TOOL], None))
    assert [call["function"]["name"] for call in offered.tool_calls] == [NAME]
    assert NAME not in offered.text
    assert (alone.tool_calls, alone.error) == ((), None)
    assert NAME in alone.text


def test_a_tokenizers_own_response_template_parses_no_calls_without_tools():
    tokenizer = family_tokenizer("qwen-2.5")
    template = read_template(tokenizer, recipe_for())
    own = {**response_template(template, calls=True)}
    tokenizer.response_template = own
    try:
        written = f"{LOOKS_LIKE_CALLS['qwen-2.5']}<|im_end|>"
        again = read_template(tokenizer, recipe_for())
        assert parse_answer(written, again, [TOOL]).tool_calls == (CALL,)
        assert parse_answer(written, again) == ParsedAnswer(LOOKS_LIKE_CALLS["qwen-2.5"])
        assert "tool_calls" in own["fields"]
    finally:
        del tokenizer.response_template


def test_thoughts_opened_by_the_prompt_are_parsed_only_after_such_a_prompt():
    tokenizer = family_tokenizer("deepseek-r1")
    template = read_template(tokenizer, recipe_for())
    written = "hm\n</think>\n\nfour<｜end▁of▁sentence｜>"
    assert parse_answer(written, template) == ParsedAnswer("four", "hm")
    assert parse_answer(written, template, prompt="<｜Assistant｜><think>\n") == ParsedAnswer("four", "hm")
    assert parse_answer("four<｜end▁of▁sentence｜>", template, prompt="<｜tool▁outputs▁end｜>") == ParsedAnswer("four")
