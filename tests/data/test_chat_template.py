"""Prompts, turns and errors over templates of all kinds."""

import pytest
from support.models import train_tokenizer
from support.templates import (
    CHATML,
    DATED,
    DOUBLED_START,
    EMPTY_THOUGHTS,
    ENDS_TWICE,
    LLAMA3,
    NO_END,
    NO_PROMPT,
    NO_SYSTEM,
    TOOLS,
    conversation,
    recipe_for,
    tokenizer_with,
)

from llmtune.data.chat_encoding import cut_turns, encode_chat
from llmtune.data.chat_messages import clean_messages
from llmtune.data.chat_template import PreparedChat, read_template, render_prompt, stop_ids
from llmtune.data.template_facts import special_tokens
from llmtune.data.template_text import fix_date
from llmtune.errors import DataError, EnvironmentProblem, RecipeError

CHAT = conversation("one two", "three", "four five", "six")
CHANGED = "changes or leaves out the text of a question"


def questions(written):
    """Write the texts of questions so, and others as they are."""
    return f"({written} if message['role'] == 'user' else message['content'])"


def answers(written):
    return f"({written} if message['role'] == 'assistant' else message['content'])"


def test_generation_stops_at_the_templates_end_if_the_tokenizers_differs():
    tokenizer = tokenizer_with(LLAMA3)
    assert tokenizer.eos_token == "<|im_end|>"
    assert stop_ids(tokenizer, recipe_for()) == tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|im_end|>"])


def test_generation_stops_at_the_tokenizers_end_without_a_template():
    tokenizer = train_tokenizer(None)
    assert stop_ids(tokenizer, recipe_for()) == [tokenizer.eos_token_id]


TOOL = {"type": "function", "function": {"name": "sum", "description": "adds", "parameters": {"type": "object"}}}
IN_A_BRANCH = "{{ tools | tojson if tools else '' }}" + CHATML.replace(
    "'<|im_end|>'", "('<|eot_id|>' if tools else '<|im_end|>')"
)


@pytest.mark.parametrize(
    "template",
    [{"default": CHATML, "tool_use": TOOLS.replace("else '<|im_end|>'", "else '<|eot_id|>'")}, IN_A_BRANCH],
    ids=["named", "branch"],
)
def test_generation_stops_at_the_end_of_an_answer_that_could_have_called_a_tool(template):
    tokenizer = tokenizer_with(template)
    ((plain,), (tooled,)) = encode_chat([CHAT, {**CHAT, "tools": [TOOL]}], tokenizer, recipe_for())
    ends = [tokenizer.convert_ids_to_tokens(one.input_ids[one.spans[-1] - 1]) for one in (plain, tooled)]
    assert ends == ["<|im_end|>", "<|eot_id|>"]
    assert {*tokenizer.convert_tokens_to_ids(ends)} <= {*stop_ids(tokenizer, recipe_for())}


def test_a_turn_ends_at_the_first_of_two_ends():
    tokenizer = tokenizer_with(ENDS_TWICE)
    template = read_template(tokenizer, recipe_for())
    [[turn]] = cut_turns(template, [(PreparedChat(template.prepare(CHAT["messages"])), [3])])
    assert turn.answer == "six<|im_end|>"


def test_a_turn_that_calls_a_tool_may_end_in_another_token():
    call = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    row = conversation("add", "", "2", "two")
    row["messages"][1]["tool_calls"] = [call]
    template = read_template(tokenizer_with(TOOLS), recipe_for())
    [[turn]] = cut_turns(template, [(PreparedChat(template.prepare(row["messages"])), [1])])
    assert turn.answer == '<call>sum{"a": 1}<|eom_id|>'
    assert turn.answer_bytes == len('<call>sum{"a": 1}')


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML.replace("assistant\n' }}", "assistant\nWell, ' }}"), "cannot be split into turns"),
        (NO_END, "not in an end-of-turn token"),
        (NO_PROMPT, "ignores add_generation_prompt"),
        (DOUBLED_START, "twice at the start"),
        (CHATML.replace("message['content']", answers("message['content'] | upper")), "not as given"),
        (CHATML.replace("message['content']", questions("message['content'] | trim | upper")), CHANGED),
        (CHATML.replace("message['content']", questions("message['content'] | replace('W', '')")), CHANGED),
        (CHATML.replace("message['content']", questions("''")), CHANGED),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for %}", "refuses"),
        ("{% set form = '%Y' %}{{ strftime_now(form) }}" + CHATML, "today's date"),
        ("{% set now = strftime_now %}{{ now('%Y') }}" + CHATML, "today's date"),
        ("{% set clock = namespace(now=strftime_now) %}{{ clock.now('%Y') }}" + CHATML, "today's date"),
        ({"default": CHATML, "tool_use": "{% set now = strftime_now %}{{ now('%Y') }}" + TOOLS}, "today's date"),
        ({"rag": CHATML, "tool_use": TOOLS}, "templates named 'rag', 'tool_use', but none named 'default'"),
    ],
)
def test_an_unusable_template_is_refused_by_name_with_a_fix(template, says):
    tokenizer = tokenizer_with(template)
    tokenizer.name_or_path = "models/odd"
    with pytest.raises(EnvironmentProblem) as caught:
        encode_chat([CHAT], tokenizer, recipe_for())
    (problem,) = caught.value.problems
    assert says in problem.what
    assert "models/odd" in problem.where
    assert "model.chat_template" in problem.fix


def test_a_model_without_a_template_is_refused_with_a_fix():
    with pytest.raises(EnvironmentProblem, match="no chat template"):
        encode_chat([CHAT], train_tokenizer(None), recipe_for())


def test_a_prompt_refused_by_the_template_is_a_data_error():
    with pytest.raises(DataError, match="System role not supported"):
        render_prompt([{"role": "system", "content": "x"}], tokenizer_with(NO_SYSTEM), recipe_for())
    with pytest.raises(DataError, match="nothing before it"):
        render_prompt([], tokenizer_with(CHATML), recipe_for())


DATES = ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )', "strftime_now ('%d %b %Y')"]


@pytest.mark.parametrize("call", DATES)
def test_a_templates_date_becomes_part_of_it(call):
    tokenizer = tokenizer_with(fix_date(DATED.replace("strftime_now('%d %b %Y')", call)))
    assert "26 Jul 2024" in tokenizer.decode(render_prompt(CHAT["messages"][:1], tokenizer, recipe_for()))
    assert "26 Jul 2024" in tokenizer.apply_chat_template(CHAT["messages"][:1], tokenize=False)


def test_a_template_may_test_for_the_date_function():
    text = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}{{ 'never' }}{% endif %}"
    tokenizer = tokenizer_with(fix_date(text + CHATML))
    assert tokenizer.apply_chat_template(CHAT["messages"][:1], tokenize=False).startswith("2024<|im_start|>")


def test_a_switch_that_the_template_never_reads_is_refused_with_the_nearest_match():
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    with pytest.raises(RecipeError) as caught:
        encode_chat([CHAT], tokenizer, recipe_for(kwargs={"enable_thinkin": False}))
    (problem,) = caught.value.problems
    assert (problem.what, problem.where) == (
        "the chat template never reads 'enable_thinkin'",
        "model.chat_template_kwargs.enable_thinkin",
    )
    assert "enable_thinking" in problem.fix


def test_template_switches_come_from_the_recipe():
    tokenizer = tokenizer_with("{{ mood or '' }}" + CHATML)
    ids = render_prompt(CHAT["messages"][:1], tokenizer, recipe_for(kwargs={"mood": "kind"}))
    assert tokenizer.decode(ids).startswith("kind<|im_start|>")


def test_cleaning_messages_does_not_change_the_row():
    row = {"role": "assistant", "content": None, "train": False, "tool_calls": [{"function": {"arguments": "{"}}]}
    assert clean_messages([row]) == [{"role": "assistant", "content": "", "tool_calls": row["tool_calls"]}]
    assert row["train"] is False


def test_special_tokens_come_longest_first():
    lengths = [len(token) for token in special_tokens(tokenizer_with(CHATML))]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths
