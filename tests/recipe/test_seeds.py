"""`train.seeds`: each further seed once, and never the recipe's own; it does not make another run of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import write_recipe

from llmtune.errors import RecipeError
from llmtune.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return write_recipe(tmp_path / "tiny.yaml", "./model", "rows.jsonl")


def test_further_seeds_leave_the_fingerprint_as_it_is(recipe: Path) -> None:
    alone, several = load_recipe(recipe), load_recipe(recipe, ["train.seeds=[1, 2]"])
    assert several.recipe.train.seeds == (1, 2)
    assert several.fingerprint == alone.fingerprint
    assert load_recipe(recipe, ["seed=1"]).fingerprint != alone.fingerprint


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ("[1, 2, 1]", "names a seed twice: 1"),
        ("[1, 7]", "names the recipe's own seed, 7, again"),
        ("[-1]", "train.seeds.0"),
        (f"[{2**32}]", "train.seeds.0"),
        ("[one]", "train.seeds.0"),
        ("3", "train.seeds"),
        ("[1.5]", "train.seeds.0"),
    ],
)
def test_a_seed_that_would_train_the_same_or_is_none_is_refused(recipe: Path, seeds: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        load_recipe(recipe, [f"train.seeds={seeds}"])
    assert all(problem.where and problem.fix for problem in error.value.problems)
