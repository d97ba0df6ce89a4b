from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmtune.errors import RecipeError
from llmtune.recipe import load_recipe
from llmtune.recipe.eval_suites_section import plain_name, suite_name
from llmtune.recipe.gate_grammar import GATE

RECIPE = """
task: chat
data: {train: rows.jsonl, test: 0.2}
model: {name: model}
evaluate: {benchmarks: [arc_easy, own/colours.yaml]}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def test_task_files_are_relative_to_the_recipe_and_names_stay(recipe, tmp_path):
    found = load_recipe(recipe).recipe.evaluate.benchmarks
    assert [one.task for one in found] == ["arc_easy", str(tmp_path / "own" / "colours.yaml")]
    assert [suite_name(one.task) for one in found] == ["arc_easy", "colours"]


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (["task=classify"], "models of task: classify"),
        (["task=speech"], "models of task: speech"),
        (["task=completion", "completion.objective=masked"], "only fills in words"),
        (["task=qa", "qa.style=extractive"], "points at answers"),
        (["task=preference", "preference.loss=reward"], "only gives scores"),
    ],
)
def test_tasks_whose_models_go_on_with_no_text_are_refused_by_name(recipe, sets, why):
    with pytest.raises(RecipeError, match=why) as found:
        load_recipe(recipe, sets)
    assert any("'evaluate.benchmarks'" in problem.what for problem in found.value.problems)


def test_two_benchmarks_of_one_name_are_refused(recipe):
    with pytest.raises(RecipeError, match="would both be called colours"):
        load_recipe(recipe, ["evaluate.benchmarks=[own/colours.yaml, other/colours.yml]"])


@pytest.mark.parametrize(
    "gate", ["benchmarks.arc_easy.acc > base", "benchmarks.gsm8k.exact_match.strict-match.low > base"]
)
def test_gates_on_benchmarks_are_read_whatever_task_of_a_group_they_name(recipe, gate):
    assert load_recipe(recipe, [f"evaluate.gates=['{gate}']"]).recipe.evaluate.gates == (gate,)


def test_a_gate_without_a_metric_is_refused(recipe):
    with pytest.raises(RecipeError, match="names a task without a metric"):
        load_recipe(recipe, ["evaluate.gates=['benchmarks.arc_easy > 0.5']"])


@pytest.mark.parametrize(
    "name", ["arc_easy", "20_newsgroups", "longproc_html_0.5k", "mmlu_(general)", "maj@64", "low", "a--b", "v1.1-x"]
)
def test_whatever_lm_eval_calls_its_tasks_a_gate_can_name_them(name):
    assert GATE.fullmatch(f"benchmarks.{plain_name(name)}.{plain_name(name)} > 0.5")


def test_checking_a_recipe_with_benchmarks_imports_neither_lm_eval_nor_torch(recipe):
    program = "import sys; from llmtune.recipe import load_recipe; load_recipe('recipe.yaml'); "
    program += "import json; print(json.dumps([n for n in ('lm_eval', 'torch', 'datasets') if n in sys.modules]))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == []
