"""Templates that omit tools are refused before encoding if rows have tools."""

import pytest
from support.conversation_table import FAMILIES, SHAPES, WITH_TOOLS, tools_of
from support.rows import write_jsonl
from support.templates import CHATML, HERMES, conversation, family_tokenizer, recipe_for, tokenizer_with

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_rows import canonical_messages
from llmtune.data.examples import encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.data.rendering_check import check_tools
from llmtune.errors import EnvironmentProblem
from llmtune.tasks.registry import get_task

SWITCHED = "{% if use_tools is defined and use_tools %}" + HERMES + "{% else %}" + CHATML + "{% endif %}"


@pytest.fixture
def prepare(tmp_path, console):
    def run(rows, **keys):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        data = {"validation": 0, "test": 0, "deduplicate": "none", **keys}
        recipe = recipe_for(data.pop("task", "chat"), data.pop("kwargs", None), train=str(path), **data)
        return recipe, prepare_rows(recipe, tmp_path / "rows", console)

    return run


def shaped(shape):
    return {"messages": SHAPES[shape], **({"tools": tools_of(shape)} if tools_of(shape) else {})}


def plain(count):
    return [conversation(f"question {i}", f"answer {i}") for i in range(count)]


def test_a_template_that_omits_tools_is_refused_before_encoding(prepare, tmp_path, console):
    recipe, rows = prepare([shaped("results"), shaped("tools"), *plain(6)])
    with pytest.raises(EnvironmentProblem) as caught:
        encode_rows(rows, get_task("chat"), tokenizer_with(CHATML), recipe, tmp_path / "examples", console)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 4
    assert problem.what == "the chat template leaves out tools, calls of tools, which 2 of 8 rows have"
    assert "model.chat_template to a Jinja file" in problem.fix
    assert not (tmp_path / "examples").exists()


def test_the_switch_that_makes_a_template_write_tools_is_named(prepare):
    recipe, rows = prepare([shaped("results"), *plain(3)])
    with pytest.raises(EnvironmentProblem) as caught:
        check_tools(rows, tokenizer_with(SWITCHED), recipe)
    assert caught.value.problems[0].fix == "Set model.chat_template_kwargs: {use_tools: true}."
    check_tools(rows, tokenizer_with(SWITCHED), recipe_for(kwargs={"use_tools": True}))


def test_rows_within_max_dropped_pass(prepare):
    recipe, rows = prepare([shaped("call"), *plain(9)], max_dropped=0.1)
    check_tools(rows, tokenizer_with(CHATML), recipe)
    with pytest.raises(EnvironmentProblem, match="1 of 10 rows"):
        check_tools(rows, tokenizer_with(CHATML), recipe_for(max_dropped=0.09))


def test_text_about_calls_is_not_a_call(prepare):
    said = 'It is {"tools":["a"],"tool_calls":[],"role":"tool"} there.'
    recipe, rows = prepare([conversation(f"Question {i}?", said) for i in range(4)])
    check_tools(rows, tokenizer_with(CHATML), recipe)


def test_preference_pairs_are_checked_too(prepare):
    pair = {"prompt": SHAPES["call"][:1], "chosen": "It rains.", "rejected": "No.", "tools": tools_of("call")}
    recipe, rows = prepare([pair], task="preference")
    with pytest.raises(EnvironmentProblem, match=r"leaves out tools, which 1 of 1 rows have"):
        check_tools(rows, tokenizer_with(CHATML), recipe)


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_that_can_write_the_row_are_accepted(prepare, name):
    writes = FAMILIES[name]
    tokenizer = family_tokenizer(writes.file or name)
    shapes = [shape for shape in WITH_TOOLS if shape != "parallel calls"]
    recipe, rows = prepare([shaped(shape) for shape in shapes], kwargs=writes.kwargs)
    encoded = encode_chat([canonical_messages(SHAPES[s], tools_of(s)) for s in shapes], tokenizer, recipe)
    refused = sum(isinstance(result, str) for result in encoded)
    if not refused:
        check_tools(rows, tokenizer, recipe)
        return
    with pytest.raises(EnvironmentProblem, match=f"which {refused} of 3 rows have"):
        check_tools(rows, tokenizer, recipe)
