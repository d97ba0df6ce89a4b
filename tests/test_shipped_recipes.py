"""The recipes that come with llmtune: each runs to the end with local weights and the rows that are shipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.runs import llmtune

from llmtune.recipe import find_recipe, list_recipes, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
ROWS = {"chat": "debian-summaries", "chat-qlora": "debian-summaries", "completion": "kjv-psalms"}


def shorten(recipe: str, model: Path) -> list[str]:
    """Options that make a shipped recipe run on a tiny model in seconds."""
    values = {
        "model.name": model,
        "data.train": f"{{path: builtin:{ROWS[recipe]}, limit: 60}}",
        "train.num_train_epochs": 1,
        "train.learning_rate": 0.01,
        "generation.max_new_tokens": 8,
        "evaluate.gates": "[]",
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("recipe", ROWS)
def test_recipe_for_hub_models_runs_to_the_end_with_local_weights(
    recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    done = llmtune("run", recipe, "--out", "run", *shorten(recipe, tiny_llama), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    assert report["evaluation"]["tuned"]["loss"] < report["evaluation"]["base"]["loss"]
    assert report["adapter"]["method"] == ("qlora" if recipe == "chat-qlora" else "lora")
    assert report["data"]["rows_in"] == 60


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes()])
def test_recipe_says_what_it_is_and_helps_an_editor(recipe: str) -> None:
    first, second = find_recipe(recipe).read_text().splitlines()[:2]
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert schema
    assert (RECIPES / schema[1]).is_file()
    assert re.fullmatch(r"# [A-Z].+\.", second)
    assert load_recipe(recipe).recipe.name == recipe


def test_table_of_recipes_names_each_of_them() -> None:
    table = (RECIPES / "README.md").read_text()
    assert set(re.findall(r"\]\((\S+)\.yaml\)", table)) == {recipe.name for recipe in list_recipes()}


@pytest.mark.parametrize("name", ["debian-sections", "debian-summaries", "kjv-psalms"])
def test_shipped_rows_are_whole_and_their_origin_is_noted(name: str) -> None:
    rows = [json.loads(line) for line in (RECIPES / f"data/{name}.jsonl").read_text().splitlines()]
    noted = re.search(rf"\| `{name}` \| ([\d,]+) \|", (RECIPES / "data/README.md").read_text())
    assert noted
    assert int(noted[1].replace(",", "")) == len(rows)
    texts = [row.get("text") or row["messages"][-2]["content"] for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for text in texts)


def test_quickstart_rows_are_balanced_and_their_choices_are_those_of_the_recipe() -> None:
    rows = [json.loads(line) for line in (RECIPES / "data/debian-sections.jsonl").read_text().splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    counts = {answer: answers.count(answer) for answer in answers}
    assert sorted(counts) == list(load_recipe("quickstart").recipe.evaluate.choices)
    assert min(counts.values()) > 0.75 * max(counts.values())
