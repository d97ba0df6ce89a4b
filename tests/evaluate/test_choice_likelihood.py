from __future__ import annotations

import pytest
from support.training import with_methods

from llmtune.data import iterate_rows
from llmtune.errors import DataError
from llmtune.evaluate import choice_likelihood as choices_module
from llmtune.evaluate.choice_likelihood import check_choices, choice_trees, find_choices


def test_few_short_repeated_answers_are_choices():
    assert find_choices(["yes", "no", "yes", "no", "no"]) == ("no", "yes")


@pytest.mark.parametrize(
    "answers",
    [
        [str(i) for i in range(21)] * 5,  # too many
        ["a", "b", "c"],  # never repeated
        ["same"] * 10,  # nothing to choose
        ["x" * 81, "y"] * 5,  # too long
        ["", "yes"] * 5,  # a row without a text answer
        [],
    ],
)
def test_other_answers_are_not(answers):
    assert find_choices(answers) == ()


def test_reading_stops_at_the_twenty_first_answer():
    def answers():
        yield from map(str, range(21))
        pytest.fail("read on")

    assert find_choices(answers()) == ()


def test_choices_without_any_reference_among_them_are_refused():
    check_choices(["yes", "no"], ["no", "maybe"])
    with pytest.raises(DataError, match="'Yes'"):
        check_choices(["yes", "no"], ["Yes", "No"])


def test_a_tree_scores_the_answer_and_the_end_of_its_turn_and_nothing_else(bench):
    choices = ("blue", "red", "the colour of the sky")
    prompts = [bench.task.split_answer(row)[0] for _, row in iterate_rows(bench.rows, "test")]
    trees = choice_trees(prompts, choices, bench.task, bench.processor, bench.recipe)
    for prompt, tree in zip(prompts, trees, strict=True):
        assert tree is not None
        for choice, branch, unscored in zip(choices, tree.branches, tree.unscored, strict=True):
            assert bench.processor.decode(branch[unscored:]) == f"{choice}<|im_end|>"
        rendered = bench.task.prompt_ids(prompt, bench.processor, bench.recipe)
        assert list(tree.prefix) == list(rendered)[: len(tree.prefix)]


def test_a_row_that_is_too_long_with_one_of_the_choices_has_no_tree(bench):
    prompts = [bench.task.split_answer(row)[0] for _, row in iterate_rows(bench.rows, "test")][:1]
    assert choice_trees(prompts, ["red", "x " * 2000], bench.task, bench.processor, bench.recipe) == [None]


def test_prompts_are_encoded_in_slices_with_the_same_trees(bench, monkeypatch):
    prompts = [bench.task.split_answer(row)[0] for _, row in iterate_rows(bench.rows, "test")]
    whole = choice_trees(prompts, ["red", "blue"], bench.task, bench.processor, bench.recipe)
    sizes = []

    def encode(rows, processor, recipe):
        sizes.append(len(rows))
        return bench.task.encode(rows, processor, recipe)

    monkeypatch.setattr(choices_module, "ENCODED_CHARACTERS", 3 * 2 * max(len(str(prompt)) for prompt in prompts))
    task = with_methods(bench.task, encode=encode)
    assert choice_trees(prompts, ["red", "blue"], task, bench.processor, bench.recipe) == whole
    assert sum(sizes) == 2 * len(prompts)
    assert max(sizes) <= 2 * 4
    assert len(sizes) > 1


def test_stated_choices_are_taken_and_references_outside_them_count_as_wrong(bench):
    found = bench.evaluate(metrics=("choice_accuracy",), choices=("red", "green"), samples=0)
    outside = [
        row for _, row in iterate_rows(bench.rows, "test") if row["messages"][1]["content"] not in ("red", "green")
    ]
    assert found.tuned["choice_accuracy"] <= 1 - len(outside) / found.rows
    assert f"{len(outside)} references are not among them" in found.signatures["choice_accuracy.choices"]
