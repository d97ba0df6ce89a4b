"""A saved template contains the recipe's values: a client that sends nothing gets the trained behaviour."""

import pytest
from support.templates import EMPTY_THOUGHTS, FAMILY_FILES, family_tokenizer, tokenizer_with

from llmtune.data.chat_template import _RENDER_ERRORS
from llmtune.data.template_text import template_variables, with_defaults

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "two?"}]
CHAT += [{"role": "assistant", "content": "four"}, {"role": "user", "content": "three?"}]


def write(tokenizer, template, **kwargs):
    """Return the rendering, or the template's error."""
    try:
        return tokenizer.apply_chat_template(
            CHAT, chat_template=template, add_generation_prompt=True, tokenize=False, **kwargs
        )
    except _RENDER_ERRORS as error:
        return repr(error)


@pytest.mark.parametrize("name", FAMILY_FILES)
def test_a_template_with_defaults_renders_as_if_it_were_sent_the_values(name):
    tokenizer = family_tokenizer(name)
    template, tokens = tokenizer.chat_template, tokenizer.special_tokens_map
    for variable in template_variables(template) - {*tokens}:
        for value in (True, False, "low", 2, 0.5):
            stored = with_defaults(template, {variable: value})
            assert write(tokenizer, stored) == write(tokenizer, template, **{variable: value})
            for sent in (not value, "high"):
                assert write(tokenizer, stored, **{variable: sent}) == write(tokenizer, template, **{variable: sent})


@pytest.mark.parametrize(
    "value", ['a "quoted" \\ text\n{% endif %} {{ no }} 🐈 ñ', None, ["x", 1, None, True], {"a b": {"c": [1.5, "d"]}}]
)
def test_any_recipe_value_can_be_a_default(value):
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    template = "{{ [told] | tojson }}"
    assert write(tokenizer, with_defaults(template, {"told": value})) == write(tokenizer, template, told=value)


def test_existing_defaults_are_not_stored_twice_and_newer_ones_win():
    tokenizer = tokenizer_with(EMPTY_THOUGHTS)
    once = with_defaults(EMPTY_THOUGHTS, {"enable_thinking": False})
    assert with_defaults(once, {"enable_thinking": False}) == once
    assert write(tokenizer, with_defaults(once, {"enable_thinking": True})) == write(
        tokenizer, EMPTY_THOUGHTS, enable_thinking=True
    )


def test_a_secret_is_not_stored_in_a_template():
    template = "{{ password }}{{ mood }}"
    stored = with_defaults(template, {"password": "hunter2", "mood": "kind"})
    assert "hunter2" not in stored
    assert "kind" in stored
