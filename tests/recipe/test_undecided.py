"""A recipe whose open values nobody chose is refused, with the choices in its comments."""

from pathlib import Path

import pytest

from llmtune.errors import RecipeError
from llmtune.recipe.loader import load_recipe

OPEN = """recipe_version: 1
task: classify
data:
  train: rows.csv
  columns:
    text: body
    label: DECIDE  # one of team (4 classes: a 3), priority (2 classes: b 5)
model:
  name: DECIDE
evaluate:
  gates: []  # DECIDE: when is the model good enough?
"""


def test_each_open_value_is_refused_with_its_line_and_its_choices(here: Path) -> None:
    Path("mine.yaml").write_text(OPEN)
    with pytest.raises(RecipeError) as refused:
        load_recipe("mine.yaml")
    label, model = refused.value.problems
    assert (label.where, "'data.columns.label' is DECIDE" in label.what) == ("mine.yaml:7", True)
    assert "one of team (4 classes: a 3), priority (2 classes: b 5)" in (label.fix or "")
    assert (model.where, "Set it to your choice" in (model.fix or "")) == ("mine.yaml:9", True)


def test_an_extending_recipe_and_the_command_line_may_choose(here: Path) -> None:
    Path("base.yaml").write_text(OPEN)
    Path("mine.yaml").write_text("extends: base.yaml\ndata: {columns: {label: team}}\n")
    recipe = load_recipe("mine.yaml", ["model.name=owner/model"]).recipe
    assert (recipe.data.columns["label"], recipe.model.name) == ("team", "owner/model")
    with pytest.raises(RecipeError, match=r"base\.yaml:9: 'model.name' is DECIDE"):
        load_recipe("mine.yaml")


def test_the_word_in_a_list_is_a_text(here: Path) -> None:
    Path("mine.yaml").write_text(OPEN.replace("label: DECIDE", "label: team").replace("name: DECIDE", "name: a/b"))
    labels = ["classify.labels=[DECIDE, ASK]"]
    assert load_recipe("mine.yaml", labels).recipe.classify.labels == ("DECIDE", "ASK")
