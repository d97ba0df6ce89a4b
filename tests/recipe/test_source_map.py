"""Test that origins survive: they are read back from the comments of a resolved recipe."""

from pathlib import Path

import pytest

from llmtune.recipe.loader import load_recipe, reload_recipe

FULL = """name: mine
seed: 7
train:
  lr_scheduler_type: cosine
  lr_scheduler_kwargs: {num_cycles: 2}
adapter:
  rank_pattern: {model.layers.0.q_proj: 8, "odd  # key": 4}
evaluate:
  gates: ["loss < base", "exact_match >= 0.8"]
"""


def resolved(write, sets=()):
    """Load a recipe, and write its resolved text as a run's recipe.yaml."""
    first = load_recipe(write(FULL, "first.yaml"), sets)
    text = first.to_yaml()
    write(text, "run/recipe.yaml", whole=True)
    return first, text


@pytest.mark.parametrize(
    "sets", [(), ("train.batch_size=4", "data.train=[a.jsonl, {path: 'b  # c.jsonl', weight: 2.0}]")]
)
def test_a_resolved_recipe_keeps_its_origins_from_run_to_run(write, sets):
    first, text = resolved(write, sets)
    plain = load_recipe("run/recipe.yaml")
    assert plain.origins["seed"] == f"run/recipe.yaml:{text.splitlines().index('seed: 7  # first.yaml:5') + 1}"
    again = reload_recipe(Path("run/recipe.yaml"))
    assert again.origins == first.origins
    assert again.to_yaml() == text
    assert (again.recipe, again.fingerprint) == (plain.recipe, plain.fingerprint)


def test_overridden_values_have_the_origin_set_and_others_keep_theirs(write):
    first, _ = resolved(write)
    sets = ["evaluate.gates=['loss < 3']", "generation.max_new_tokens=5"]
    again = reload_recipe(Path("run/recipe.yaml"), sets, ("evaluate", "generation"))
    assert again.origins == {**first.origins, "evaluate.gates": "--set", "generation.max_new_tokens": "--set"}


def test_a_value_without_a_comment_keeps_its_place(write):
    _, text = resolved(write)
    text = text.replace("seed: 7  # first.yaml:5", "seed: 8")
    write(text, "run/recipe.yaml", whole=True)
    again = reload_recipe(Path("run/recipe.yaml"))
    assert again.origins["seed"].startswith("run/recipe.yaml:")
    assert again.origins["train.batch_size"] == "default"
