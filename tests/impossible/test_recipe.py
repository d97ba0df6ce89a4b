"""What must be impossible with recipes; that a key does nothing stands in test_keys.py."""

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
    kept="The list of keys is closed. An unknown one is an error with file, line, key path and the nearest match, "
    "beside all else that is wrong.",
    shows="error tiny.yaml:... unknown key 'train.learning_rat' -> Did you mean 'learning_rate'?",
    also=["recipe/test_validation.py::test_an_invalid_key_or_value_is_refused_with_place_cause_and_fix"],
)
def test_a_misspelt_key_is_refused_with_the_nearest(run, without, shows):
    def let_pass(errors, source_map):
        return schema_problems(errors, source_map)[0], []

    misspelt = {"train": {"learning_rate": None, "learning_rat": 0.25}}
    with without("llmtune.recipe.validation.schema_problems", let_pass):
        run("prepare", **misspelt)
        assert load_recipe("tiny.yaml").recipe.train.learning_rate != 0.25, "nobody was told that it counts for nothing"
    shows(run("prepare", code=2, **misspelt))


@pytest.mark.guarantee(
    12,
    cannot="a value whose origin cannot be shown",
    kept="Values keep the place that they were read from: default, file and line, or `--set`. `recipes show --origin` "
    "and the run's own recipe.yaml have it behind each of them.",
    shows="seed: 7 # tiny.yaml:... learning_rate: 0.5 # --set ... max_steps: null # default",
    also=["recipe/test_loader.py::test_every_value_has_an_origin"],
)
def test_each_value_of_a_recipe_has_its_origin_behind_it(place, without, shows):
    def unexplained() -> list[str]:
        shown = invoke("recipes", "show", "tiny.yaml", "--origin", "--set", f"{RATE}=0.5").stdout
        shows(shown) if "--set" in shown else None
        return [line for line in shown.splitlines() if re.search(r"[^:]$", line) and "  # " not in line]

    write_recipe(Path("tiny.yaml"), "./model", "rows.jsonl")
    with without("llmtune.recipe.loader.list_origins", lambda recipe, source_map: {}):
        assert "  learning_rate: 0.5" in unexplained()
    assert unexplained() == []
