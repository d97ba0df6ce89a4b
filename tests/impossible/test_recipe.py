"""Failures that must be impossible in recipes; test_keys.py covers keys without effect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.runs import invoke, write_recipe

from llmtune.recipe.loader import load_recipe
from llmtune.recipe.validation import schema_problems

RATE = "train.learning_rate"


@pytest.mark.guarantee(
    11,
    cannot="an unknown key in a recipe",
    kept="The list of keys is closed. An unknown key is an error with file, line, key path and the nearest "
    "match, reported together with all other mistakes.",
    shows="error tiny.yaml:... unknown key 'train.learning_rat' -> Did you mean 'learning_rate'?",
    also=["recipe/test_validation.py::test_an_invalid_key_or_value_is_refused_with_place_cause_and_fix"],
)
def test_a_misspelt_key_is_refused_with_the_nearest_match(run, without, shows):
    def let_pass(errors, source_map):
        return schema_problems(errors, source_map)[0], []

    misspelt = {"train": {"learning_rate": None, "learning_rat": 0.25}}
    with without("llmtune.recipe.validation.schema_problems", let_pass):
        run("prepare", **misspelt)
        assert load_recipe("tiny.yaml").recipe.train.learning_rate != 0.25, "ignored without an error"
    shows(run("prepare", code=2, **misspelt))


@pytest.mark.guarantee(
    12,
    cannot="a value whose origin cannot be shown",
    kept="Each value keeps its origin: default, file and line, or `--set`. `recipes show --origin` and the run's "
    "own recipe.yaml show it after the value.",
    shows="seed: 7 # tiny.yaml:... learning_rate: 0.5 # --set ... max_steps: null # default",
    also=["recipe/test_loader.py::test_every_value_has_an_origin"],
)
def test_each_value_of_a_recipe_shows_its_origin(place, without, shows):
    def unexplained() -> list[str]:
        shown = invoke("recipes", "show", "tiny.yaml", "--origin", "--set", f"{RATE}=0.5").stdout
        shows(shown) if "--set" in shown else None
        return [line for line in shown.splitlines() if re.search(r"[^:]$", line) and "  # " not in line]

    write_recipe(Path("tiny.yaml"), "./model", "rows.jsonl")
    with without("llmtune.recipe.loader.list_origins", lambda recipe, source_map: {}):
        assert "  learning_rate: 0.5" in unexplained()
    assert unexplained() == []
