"""Templates that write contents as they stand, and conversations rendered once with blanks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import CHATML
from support.templates import ENDS_TWICE, MARKED, NO_SYSTEM, STABLE, THINKING, recipe_for, tokenizer_with

from llmtune.data.chat_template import TemplateRefusal, read_template
from llmtune.data.template_cache import as_form, blank, writes_as_said

ONE = "{% for m in messages %}BODY{% endfor %}"
BODIES = {
    "{{ m.content }}": "all",
    "{{ m['content'] | trim }}": "stripped",
    "{{ '<' ~ m.role ~ '>' + m.content }}": "all",
    "{% if m.content %}{{ m.content }}{% endif %}": "all",
    "{% if m.content is string and m.content is not none %}{{ m.content }}{% endif %}": "all",
    "{% if 'content' in m and m.content != none %}{{ m.content }}{% endif %}": "all",
    "{% set said = m.content %}{{ said or '' }}": "all",
    "{{ m.content if m.role == 'user' else 'x' + m.content }}": "all",
    "{% if not loop.last and loop.nextitem.role == 'user' %}{{ loop.nextitem.content }}{% endif %}": "all",
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ m.content }}": "all",
    "{% if messages | length > 2 and messages[0].role == 'system' %}{{ messages[-1]['content'] }}{% endif %}": "all",
    "{% if '</think>' in m.content %}a{% endif %}": None,
    "{% if m.content == 'a' %}a{% endif %}": None,
    "{{ m.content.split('a')[-1] }}": None,
    "{{ m.content[:3] }}": None,
    "{{ m.content | upper }}": None,
    "{{ m.content | length }}": None,
    "{{ m | tojson }}": None,
    "{{ m }}": None,
    "{{ m.get('content') }}": None,
    "{{ m['get']('content') }}": None,
    "{% for k in m %}{{ m[k] }}{% endfor %}": None,
    "{% for k, v in m.items() %}{{ v }}{% endfor %}": None,
    "{% for c in m.content %}{{ c }}{% endfor %}": None,
    "{{ 'a'.join([m.content]) }}": None,
    "{{ {'a': m.content}['a'] }}": None,
    "{{ '%s' % m.content }}": None,
    "{% set ns = namespace(a='') %}{% set ns.a = m.content %}{{ ns.a | upper }}": None,
    "{% set said %}{{ m.content }}{% endset %}{{ said | upper }}": None,
    "{% macro say(x) %}{{ x | upper }}{% endmacro %}{{ say(m.content) }}": None,
    "{% set n = m.content %}{{ n | upper }}": None,
    "{{ loop.previtem.content | upper }}": None,
    "{% set l = loop %}{{ l.previtem.content | upper }}": None,
    "{% if loop.changed(m.content) %}a{% endif %}": None,
    "{% set k = 'content' %}{{ m[k] | upper }}": None,
    "{{ messages | map(attribute='content') | join(' ') | upper }}": None,
    "{{ raise_exception('no ' + m.content) }}": None,
    "{% filter upper %}{{ m.content }}{% endfilter %}": None,
    "{% for x in [1] recursive %}{{ m.content }}{% endfor %}": None,
    "{{ m.content": None,
    "{{ m.content | random }}": None,
}
TEMPLATES = {**STABLE, "ends twice": ENDS_TWICE, "thinking": THINKING}
SAID = st.text(min_size=1, max_size=20)


@pytest.mark.parametrize("body", BODIES)
def test_a_template_that_looks_into_contents_is_told_from_one_that_writes_them(body):
    assert writes_as_said(ONE.replace("BODY", body)) == BODIES[body]


def test_templates_as_models_have_them_are_known():
    assert {name: writes_as_said(template) for name, template in STABLE.items()} == {
        "chatml": "all",
        "llama2": "all",
        "llama3": "stripped",
        "marked": None,
        "default system": "all",
        "tools": "all",
        "no system": "all",
    }
    assert writes_as_said(THINKING) is None


def test_a_variable_that_is_given_a_content_later_is_followed():
    late = "{% for m in messages %}{{ said | default('') | upper }}{% set said = m.content %}{% endfor %}"
    assert writes_as_said(late) is None


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(said=st.lists(st.tuples(SAID, SAID, st.booleans()), min_size=8, max_size=12), answer_next=st.booleans())
def test_conversations_rendered_together_are_those_rendered_one_by_one(template, said, answer_next):
    chat = read_template(tokenizer_with(TEMPLATES[template]), recipe_for())
    conversations = []
    for question, answer, system in said:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append([{"role": "system", "content": answer}] * system + messages)
    expected = [_render(chat, messages, answer_next) for messages in conversations]
    found = chat.render_all(conversations, answer_next)
    assert [str(text) for text in found] == expected


def _render(chat, messages, answer_next):
    try:
        return chat.render(messages, None, answer_next)
    except TemplateRefusal as refusal:
        return str(refusal)


def test_a_form_is_filled_where_its_blanks_are_whatever_is_said():
    form = as_form(f"<{blank(1)}|{blank(0)}|{blank(1)}>")
    assert form.fill(["a", blank(0)]) == f"<{blank(0)}|a|{blank(0)}>"


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, MARKED])
def test_messages_with_more_than_a_role_and_a_text_are_rendered_by_themselves(template):
    chat = read_template(tokenizer_with(template), recipe_for())
    plain = [[{"role": "user", "content": f"question {k}"}] for k in range(9)]
    special = [[{"role": "user", "content": ""}], [{"role": "user", "content": "x", "name": "Ada"}], []]
    found = chat.render_all([*plain, *special])
    assert found[:9] == [chat.render(messages) for messages in plain]
    assert found[9:11] == [chat.render(messages) for messages in special[:2]]
    assert isinstance(found[11], TemplateRefusal)
