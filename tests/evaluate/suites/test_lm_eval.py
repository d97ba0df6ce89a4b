"""Tasks of lm-eval: unusable ones are refused before a model is loaded."""

import io
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.benchmark_tasks import CHOOSE, GROUP, LIKELY, recipe_with

from llmtune.errors import DataError, EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.evaluate.cache_keys import evaluation_files
from llmtune.evaluate.suites.lm_eval import check_task_names, list_task_files, load_benchmarks, quietly
from llmtune.launch.python_api import names_remote
from llmtune.recipe.schema import Recipe

pytestmark = pytest.mark.needs("lm_eval")


def test_lm_eval_stays_quiet_and_leaves_random_states_alone(
    tasks: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = load_benchmarks(recipe_with(tasks / "choose.yaml"), Console(file=io.StringIO()))
    assert list(one.tasks) == ["chosen_colours"]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with quietly():
        print("loud")
        logging.getLogger("lm_eval.evaluator").warning("loud")
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def refusal(recipe: Recipe, kind: type[LlmtuneError]) -> str:
    with pytest.raises(kind) as found:
        load_benchmarks(recipe, Console(file=io.StringIO()))
    assert type(found.value) is kind
    return str(found.value)


@pytest.mark.parametrize(
    ("was", "now", "kind", "told"),
    [
        ("questions.jsonl", "lost.jsonl", DataError, "Unable to find"),
        ("questions.jsonl", "empty.jsonl", DataError, "no rows"),
        ("test_split: test", "test_split: exam", DataError, "'exam'"),
        ("{{question}}", "{{question.first.word}}", DataError, "no attribute 'first'"),
        ("metric: acc,", "metric: accurate,", RecipeError, "metric accurate is not part of lm-eval"),
        ("metric: acc,", "metric: f1, hf_evaluate: true,", RecipeError, "its code would be downloaded from a hub"),
        ("task: chosen", "unsafe_code: true\ntask: chosen", RecipeError, "runs model-written code"),
        ("doc_to_target: answer", "doc_to_target: !function lost.target", EnvironmentProblem, "module lost"),
        ("doc_to_target: answer", "doc_to_target: !function there.lost", DataError, "no function 'lost'"),
        ("dataset_path: json", "dataset_path: someone/questions", EnvironmentProblem, "Set network: true"),
        ("task: chosen", "include: changed.yaml\ntask: chosen", DataError, "nclude cycle"),
        ("task: chosen", "include: lost.yaml\ntask: chosen", DataError, "lost.yaml"),
        ("output_type: multiple_choice", "output_type: guess", DataError, "guess"),
    ],
)
def test_an_unusable_task_is_refused_before_a_model_is_loaded(
    tasks: Path, was: str, now: str, kind: type[LlmtuneError], told: str
) -> None:
    (tasks / "empty.jsonl").write_text("")
    (tasks / "there.py").write_text("")
    text = CHOOSE.replace(was, now, 1)
    if "someone" in now:
        text = "\n".join(line for line in text.splitlines() if "dataset_kwargs" not in line)
    assert text != CHOOSE
    (tasks / "changed.yaml").write_text(text)
    assert told in refusal(recipe_with(tasks / "changed.yaml"), kind)


def test_settings_that_lm_eval_would_ignore_are_refused(tasks: Path) -> None:
    (tasks / "zero.yaml").write_text(CHOOSE + "num_fewshot: 0\n")
    named = {"task": str(tasks / "zero.yaml"), "num_fewshot": 2}
    assert "num_fewshot: 2 would have no effect" in refusal(recipe_with(named), RecipeError)


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ("benchmarks.chose.acc > 0.1", "Did you mean 'choose'?"),
        ("benchmarks.choose.accuracy > 0.1", "Metrics of choose: acc, acc_norm."),
    ],
)
def test_a_gate_on_an_unknown_benchmark_score_is_refused_with_the_known_ones(tasks: Path, gate: str, told: str) -> None:
    assert told in refusal(recipe_with(tasks / "choose.yaml", gates=(gate,)), RecipeError)


def test_two_benchmarks_with_one_task_are_refused(tasks: Path) -> None:
    (tasks / "likely.yaml").write_text(LIKELY)
    (tasks / "one.yaml").write_text(GROUP.replace("WEIGHED", "true"))
    (tasks / "two.yaml").write_text(GROUP.replace("WEIGHED", "true").replace("every_colour", "other"))
    told = refusal(recipe_with(tasks / "one.yaml", tasks / "two.yaml"), RecipeError)
    assert "chosen_colours is in both" in told


@pytest.mark.slow
def test_an_unknown_task_is_reported_with_the_nearest_known_one() -> None:
    check_task_names(recipe_with("hellaswag", "arc_easy"))
    with pytest.raises(RecipeError, match=r"evaluate\.benchmarks\.1: lm-eval has no task 'hellaswagg'\s+Did you mean"):
        check_task_names(recipe_with("arc_easy", "hellaswagg"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [a\n x: {", "changed.yaml:2: the task file is not valid YAML"),
        ("hello: 1", "neither `task` nor `group`"),
        ("- 1", "neither `task` nor `group`"),
        (None, "changed.yaml: task file not found"),
    ],
)
def test_a_bad_task_file_is_reported_at_once_by_name(tasks: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tasks / "changed.yaml").write_text(text)
    with pytest.raises(DataError, match=re.escape(told)):
        check_task_names(recipe_with(tasks / "changed.yaml"))


def test_a_missing_lm_eval_is_reported_with_the_extra_to_install(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.recipe.extras.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmtune-cli\[benchmarks\]'"):
        check_task_names(recipe_with(tasks / "choose.yaml"))
    check_task_names(recipe_with())


def test_named_tasks_need_the_network_and_files_do_not_unless_the_recipe_says_so(tasks: Path) -> None:
    choose = str(tasks / "choose.yaml")
    assert names_remote(recipe_with("hellaswag"))
    assert not names_remote(recipe_with(choose))
    assert names_remote(recipe_with({"task": choose, "network": True}))
    assert not names_remote(recipe_with({"task": "hellaswag", "network": False}))


def test_every_file_a_task_file_depends_on_counts(tasks: Path) -> None:
    (tasks / "more").mkdir()
    (tasks / "own.py").write_text("def target(row):\n    return row['answer']\n")
    text = CHOOSE.replace("doc_to_target: answer", "doc_to_target: !function own.target").replace(
        "test: quest", "test: ../quest"
    )
    (tasks / "more" / "own.py").write_text("def target(row):\n    return row['answer']\n")
    (tasks / "more" / "inner.yaml").write_text(text)
    (tasks / "more" / "outer.yaml").write_text("include: inner.yaml\ntask: outer\n")
    found = list_task_files(tasks / "more" / "outer.yaml")
    names = {path.relative_to(tasks.resolve()).as_posix() for path in found}
    assert names == {"more/outer.yaml", "more/inner.yaml", "more/own.py", "questions.jsonl"}
    (tasks / "group.yaml").write_text("group: g\ntask: [chosen_colours]\n")
    (tasks / "broken.yaml").write_text("task: [a\n x: {")
    names = {path.name for path in list_task_files(tasks / "group.yaml")}
    assert {"group.yaml", "choose.yaml", "questions.jsonl"} < names
    assert evaluation_files(recipe_with("hellaswag", tasks / "lost.yaml"), tasks / "run") == []
