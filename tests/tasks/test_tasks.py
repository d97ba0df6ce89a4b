"""The table of tasks, and how a task formats a row."""

import pytest
from support.templates import CHATML, conversation, recipe_for, tokenizer_with

from llmtune.tasks.registry import VARIANTS, get_task


def test_a_task_is_found_by_its_name():
    assert all(get_task(name) is variants[0] for name, variants in VARIANTS.items())
    assert all(variant.name == name for name, variants in VARIANTS.items() for variant in variants)


def test_a_chat_row_is_split_at_its_last_answer():
    row = {**conversation("one", "two", "three", "four", "five"), "tools": [{"type": "function"}]}
    prompt, answer = get_task("chat").split_answer(row)
    assert answer == "four"
    assert prompt == {"messages": row["messages"][:3], "tools": row["tools"]}


def test_a_chat_row_is_split_at_its_last_trained_answer():
    row = conversation("one", "two", "three", "four")
    row["messages"][3]["train"] = False
    assert get_task("chat").split_answer(row) == ({"messages": row["messages"][:1]}, "two")
    row["messages"][1]["train"] = False
    assert get_task("chat").split_answer(row)[1] == "four"


def test_a_chat_row_without_an_answer_is_all_prompt():
    row = conversation("one")
    assert get_task("chat").split_answer(row) == (row, "")


def test_a_completion_row_is_split_at_its_completion():
    assert get_task("completion").split_answer({"prompt": "a", "completion": "b"}) == (
        {"prompt": "a", "completion": ""},
        "b",
    )


@pytest.mark.parametrize(
    ("name", "row"),
    [("chat", conversation("one two", "three")), ("completion", {"prompt": "one two", "completion": " three"})],
)
def test_generation_starts_from_the_ids_that_the_example_begins_with(name, row):
    task, tokenizer, recipe = get_task(name), tokenizer_with(CHATML), recipe_for(name)
    ((example,),) = task.encode([row], tokenizer, recipe)
    prompt, answer = task.split_answer(row)
    start, end = example.spans
    assert task.prompt_ids(prompt, tokenizer, recipe) == example.input_ids[:start]
    assert tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True) == answer
