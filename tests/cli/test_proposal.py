"""The recipe of `llmtune init` has what the rows show: spellings, metrics, gates, enough test rows, rewards."""

import csv
import json
from pathlib import Path

import pytest
from support.runs import invoke

from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("here")


def propose(rows: list[dict[str, object]], *options: str) -> tuple[Recipe, str]:
    """Return the recipe for rows and what was printed."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = invoke("init", "rows.jsonl", "--out", "mine.yaml", *options)
    assert done.exit_code == 0, done.stderr
    sets = ["data.columns.label=Thema"] if "data.columns.label" in done.stdout else []
    sets += ["reinforce.rewards={exact_match: 1.0}"] if "reinforce.rewards" in done.stdout else []
    return load_recipe("mine.yaml", sets).recipe, done.stdout + done.stderr


def test_spellings_of_classes_in_all_columns_are_one_map_that_prepares() -> None:
    themes, teams = (
        ("Rechnung", "rechnung ", "Rechnung", "Versand", "VERSAND", "Versand"),
        ("Büro", "Lager", "BÜRO", "Büro"),
    )
    rows = [{"Text": f"Wo ist {i}?", "Thema": themes[i % 6], "Team": teams[i % 4]} for i in range(60)]
    recipe, printed = propose(rows)
    assert recipe.renames == {"rechnung": "Rechnung", "VERSAND": "Versand", "BÜRO": "Büro"}
    assert "The recipe renames them." in printed
    assert "needs a look" not in printed
    for column in ("Thema", "Team"):
        options = ("--set", f"data.columns.label={column}", "--set", "data.deduplicate=exact")
        assert invoke("recipes", "check", "mine.yaml", *options).exit_code == 0


def test_the_problem_of_several_spellings_has_one_map_for_all() -> None:
    labels = ("Rechnung", "rechnung", "Versand", "VERSAND", "Versand")
    with open("rows.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([f"Wo ist {i}?", labels[i % 5]] for i in range(40))])
    Path("mine.yaml").write_text("task: classify\nmodel: {name: x/y}\ndata: {train: rows.csv, deduplicate: exact}\n")
    done = invoke("recipes", "check", "mine.yaml")
    words = " ".join(done.stderr.split())
    assert words.count("one class in several spellings") == 2
    assert words.count("classify.rename: {rechnung: Rechnung, VERSAND: Versand}") == words.count("rename:") == 1


@pytest.mark.parametrize(("rows", "share"), [(30, 0.5), (40, 0.5), (100, 0.2), (1000, 0.1)])
def test_the_test_share_gives_rows_enough_for_a_verdict(rows: int, share: float) -> None:
    recipe, _ = propose([{"prompt": f"Where is number {i}?", "completion": f"It is at {i}."} for i in range(rows)])
    assert recipe.data.test == share


def test_a_test_too_small_for_its_gates_is_named_before_training() -> None:
    propose([{"prompt": f"Where is number {i}?", "completion": f"It is at {i}."} for i in range(40)])
    sets = ["--set", "data.deduplicate=exact", "--set", "data.test=0.1", "--set", "evaluate.gates=[chrf.low > base]"]
    sets += ["--set", "model.name=builtin:smollm2-135m-instruct"]
    said = "test rows can hardly decide the gate 'chrf.low > base': a difference is judged from 10 rows on."
    for command in (("recipes", "check"), ("prepare",)):
        assert said in " ".join(invoke(*command, "mine.yaml", *sets).output.split())
    assert said not in " ".join(invoke("recipes", "check", "mine.yaml", *sets, "--set", "data.test=0.5").output.split())


def test_answers_of_one_word_are_compared_exactly() -> None:
    rows = [{"prompt": f"How much is {i} plus {i}?", "completion": str(2 * i)} for i in range(60)]
    recipe, _ = propose(rows)
    assert (recipe.evaluate.metrics, recipe.evaluate.gates) == (("loss", "exact_match"), ("exact_match.low > base",))


@pytest.mark.parametrize("row", ["prompt", "messages"])
def test_prompts_without_answers_are_for_reinforce(row: str) -> None:
    asked = [f"How much is {i} plus {i * 3 % 17}?" for i in range(60)]
    prompts = asked if row == "prompt" else [[{"role": "user", "content": text}] for text in asked]
    rows = [{row: text} for text in prompts]
    if row == "messages":
        Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        assert "Prompts without answers are for --task reinforce." in invoke("init", "rows.jsonl").stderr
    recipe, printed = propose(rows, *(("--task", "reinforce") if row == "messages" else ()))
    assert recipe.task == "reinforce"
    assert "choose reinforce.rewards in mine.yaml" in printed
    assert "needs a look" not in printed
    assert "'reinforce.rewards' is DECIDE" in invoke("recipes", "check", "mine.yaml").stderr
