import random

import pytest
import torch
from support.adapting import sharpened
from support.training import with_methods
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from llmtune.data.row_store import iterate_rows
from llmtune.errors import DataError
from llmtune.evaluate import shared_prefix
from llmtune.evaluate.shared_prefix import (
    check_choices,
    choice_trees,
    find_choice,
    find_choices,
    make_tree,
    score_as_trees,
    score_trees,
    takes_trees,
)
from llmtune.model.packed_attention import PACKED

END = 2
SHAPE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_trees(count=7):
    draw = random.Random(0)
    trees = []
    for _ in range(count):
        prompt = [draw.randrange(4, 300) for _ in range(draw.randrange(1, 60))]
        answers = [
            [7, 8, 9],
            [7, 8, 10],
            [7],
            [7, 8],
            [11, 12, 13, 14, 15, 16],
        ]  # common beginnings, one inside another
        trees.append(make_tree([[*prompt, *answer, END] for answer in answers], [len(prompt)] * len(answers)))
    return trees


def by_hand(model, tree):
    """Each continuation alone, one token at a time, without masks, padding or batches."""
    scores = []
    for branch, unscored in zip(tree.branches, tree.unscored, strict=True):
        ids = torch.tensor([tree.prefix + branch])
        logs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        first = len(tree.prefix) + unscored
        scores.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(first, ids.shape[1])))
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED])
def test_a_tree_scores_like_separate_forward_passes(tiny_llama, attention):
    model, trees = sharpened(tiny_llama, attention), make_trees()
    with torch.inference_mode():
        assert takes_trees(model, trees[0], "cpu")
        found = score_trees(model, trees, device="cpu", budget=200)
        for tree, scores in zip(trees, found, strict=True):
            assert scores == pytest.approx(by_hand(model, tree), abs=1e-4)
            assert max(scores) - min(scores) > 1


def test_a_tree_scores_like_separate_forward_passes_with_learned_positions(tiny_gpt2):
    model, trees = sharpened(tiny_gpt2), make_trees()
    with torch.inference_mode():
        assert takes_trees(model, trees[0], "cpu")
        for tree, scores in zip(trees, score_as_trees(model, trees, "cpu"), strict=True):
            assert scores == pytest.approx(by_hand(model, tree), abs=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        MistralForCausalLM(MistralConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2, sliding_window=16)),
        BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4)),
    ],
    ids=["sliding window", "ALiBi"],
)
def test_a_model_that_rejects_trees_is_scored_row_by_row(model):
    model.eval()
    trees = make_trees(3)
    with torch.inference_mode():
        assert not takes_trees(model, max(trees, key=lambda tree: tree.length), "cpu")
        for tree, scores in zip(trees, score_trees(model, trees, device="cpu", budget=200), strict=True):
            assert scores == pytest.approx(by_hand(model, tree), abs=1e-4)


def test_a_tree_contains_the_common_prefix_once():
    tree = make_tree([[1, 5, 6, 7, END], [1, 5, 6, 8, 9, END]], [3, 3])
    assert tree.prefix == (1, 5, 6)
    assert tree.branches == ((7, END), (8, 9, END))
    assert tree.unscored == (0, 0)
    assert tree.length == 3 + 1 + 2


def test_tokens_before_the_answer_are_not_scored_if_the_texts_diverge_early():
    tree = make_tree([[1, 5, 6, 7], [1, 4, 6, 7]], [3, 3])
    assert tree.prefix == (1,)
    assert tree.unscored == (2, 2)


def test_without_trees_there_is_no_work(tiny_llama):
    assert score_trees(sharpened(tiny_llama), [], device="cpu", budget=10) == []


def test_few_short_repeated_answers_are_choices():
    assert find_choices(["yes", "no", "yes", "no", "no"]) == ("no", "yes")


def test_answers_that_differ_only_by_blanks_or_composition_are_one_choice_in_its_most_frequent_form():
    choices = find_choices(["ja ", "ja", "ja ", "nein", "nein", "scho\u0308n", "schön", "schön"])
    assert choices == ("ja ", "nein", "schön")
    assert [find_choice(answer, choices) for answer in ("ja", "\u00a0nein", "Ja")] == ["ja ", "nein", "Ja"]
    check_choices(["ja"], ["ja "])


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
def test_other_answers_are_not_choices(answers):
    assert find_choices(answers) == ()


def test_reading_stops_at_the_twenty_first_answer():
    def answers():
        yield from map(str, range(21))
        pytest.fail("read on")

    assert find_choices(answers()) == ()


def test_choices_without_any_reference_are_refused():
    check_choices(["yes", "no"], ["no", "maybe"])
    with pytest.raises(DataError, match="'Yes'"):
        check_choices(["yes", "no"], ["Yes", "No"])


def test_a_tree_scores_only_the_answer_and_the_end_of_its_turn(bench):
    choices = ("blue", "red", "the colour of the sky")
    prompts = [bench.task.split_answer(row)[0] for _, row in iterate_rows(bench.rows, "test")]
    trees = choice_trees(prompts, choices, bench.task, bench.processor, bench.recipe)
    for prompt, tree in zip(prompts, trees, strict=True):
        assert tree is not None
        for choice, branch, unscored in zip(choices, tree.branches, tree.unscored, strict=True):
            assert bench.processor.decode(branch[unscored:]) == f"{choice}<|im_end|>"
        rendered = bench.task.prompt_ids(prompt, bench.processor, bench.recipe)
        assert list(tree.prefix) == list(rendered)[: len(tree.prefix)]


def test_a_row_too_long_with_one_of_the_choices_has_no_tree(bench):
    prompts = [bench.task.split_answer(row)[0] for _, row in iterate_rows(bench.rows, "test")][:1]
    assert choice_trees(prompts, ["red", "x " * 2000], bench.task, bench.processor, bench.recipe) == [None]


def test_prompts_are_encoded_in_slices_with_the_same_trees(bench, monkeypatch):
    prompts = [bench.task.split_answer(row)[0] for _, row in iterate_rows(bench.rows, "test")]
    whole = choice_trees(prompts, ["red", "blue"], bench.task, bench.processor, bench.recipe)
    sizes = []

    def encode(rows, processor, recipe):
        sizes.append(len(rows))
        return bench.task.encode(rows, processor, recipe)

    monkeypatch.setattr(shared_prefix, "ENCODED_CHARACTERS", 3 * 2 * max(len(str(prompt)) for prompt in prompts))
    task = with_methods(bench.task, encode=encode)
    assert choice_trees(prompts, ["red", "blue"], task, bench.processor, bench.recipe) == whole
    assert sum(sizes) == 2 * len(prompts)
    assert max(sizes) <= 2 * 4
    assert len(sizes) > 1


def test_stated_choices_are_used_and_references_outside_them_count_as_wrong(bench):
    found = bench.evaluate(metrics=("choice_accuracy",), choices=("red", "green"), samples=0)
    outside = [
        row for _, row in iterate_rows(bench.rows, "test") if row["messages"][1]["content"] not in ("red", "green")
    ]
    assert found.tuned["choice_accuracy"] <= 1 - len(outside) / found.rows
    assert f"{len(outside)} references are not among them" in found.signatures["choice_accuracy.choices"]
