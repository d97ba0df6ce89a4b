from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.models import build_llama
from support.rows import write_jsonl
from support.runs import write_recipe

from llmtune.errors import DataError, EnvironmentProblem, GateFailed, LlmtuneError, RecipeError
from llmtune.evaluate.lm_eval import check_benchmarks, load_benchmarks, quietly
from llmtune.evaluate.step_inputs import suite_files
from llmtune.pipeline import evaluate_run, run_pipeline
from llmtune.recipe import Recipe, load_recipe
from llmtune.session import Options
from llmtune.store.lm_eval_tasks import list_task_files, read_task_file
from llmtune.store.process_environment import names_remote

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
COLOURS = ("red", "green", "blue", "black")
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone", "moon", "tree")
PROMPT = "Question: {}\nAnswer:"
CHOOSE = r"""
task: chosen_colours
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITE = r"""
task: written_colours
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 8, do_sample: false}
filter_list:
  - {name: strict-match, filter: [{function: remove_whitespace}, {function: take_first}]}
  - {name: as@said, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""
READ = """
task: read_colours
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
LIKELY = """
task: likely_colours
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
GROUP = """
group: every_colour
task:
  - chosen_colours
  - {group: inner, task: [likely_colours], aggregate_metric_list: [{metric: acc, weight_by_size: true}]}
aggregate_metric_list: [{metric: acc, weight_by_size: WEIGHED}]
"""


def questions(count: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Which colour has the {THINGS[i % 10]} on day {i * 7}?",
            "choices": list(COLOURS),
            "answer": i % 10 % 4,
        }
        for i in range(count)
    ]


def rows_to_learn() -> list[dict[str, str]]:
    """The questions with their answers, in the benchmarks' own words."""
    return [
        {"prompt": PROMPT.format(one["question"]), "completion": f" {COLOURS[one['answer']]}\n"} for one in questions()
    ]


def write_tasks(folder: Path) -> None:
    write_jsonl(folder / "questions.jsonl", questions())
    for name, text in (("choose", CHOOSE), ("write", WRITE), ("read", READ)):
        (folder / f"{name}.yaml").write_text(text)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_tasks(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has learned the questions of the benchmarks by heart."""
    place = tmp_path_factory.mktemp("harness")
    write_tasks(place)
    model = build_llama(place / "model")
    recipe = write_recipe(
        place / "recipe.yaml",
        model,
        write_jsonl(place / "rows.jsonl", rows_to_learn()),
        task="completion",
        data={"test": 0.0, "validation": 0.0, "deduplicate": "none", "packing": None},
        train={"num_train_epochs": 20, "learning_rate": 5e-3, "batch_size": 4},
        adapter={"r": 32, "lora_alpha": 64},
        evaluate={"metrics": None, "benchmarks": ["choose.yaml", "write.yaml", "read.yaml"]},
    )
    run_pipeline(load_recipe(str(recipe)), Options(out=place / "run", offline=True), Console(file=io.StringIO()))
    return place


def study(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "report.json").read_text())["evaluation"]["studies"]
    return found["benchmarks"]


def lm_eval_files(place: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "evaluation" / "benchmarks" / f"{name}.json").read_text())
    return found


def plain_lm_eval(place: Path, **settings: Any) -> dict[str, Any]:
    """What lm-eval says of a model that it loads by itself, a request at a time."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place), include_defaults=False)
    named = ["chosen_colours", "written_colours", "read_colours"]
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()), quietly():
        found: dict[str, Any] = simple_evaluate(
            "hf", {"dtype": "float32", **settings}, tasks=named, task_manager=manager, batch_size=1, device="cpu"
        )
    return found


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task}/{key}": value
        for task, scores in results["results"].items()
        for key, value in scores.items()
        if isinstance(value, float) and not isinstance(value, bool)
    }


@pytest.mark.parametrize(("name", "adapter"), [("base", {}), ("tuned", {"peft": "run/adapter"})])
def test_scores_are_those_of_lm_eval_with_a_model_that_it_loads_itself(
    done: Path, name: str, adapter: dict[str, str]
) -> None:
    plain = numbers(plain_lm_eval(done, pretrained="model", **adapter))
    assert numbers(lm_eval_files(done, name)) == pytest.approx(plain, rel=1e-5)
    scores = study(done)[name]
    assert scores["choose.acc"] == plain["chosen_colours/acc,none"]
    assert scores["write.exact_match.strict-match"] == plain["written_colours/exact_match,strict-match"]
    assert scores["write.exact_match.as_said"] == plain["written_colours/exact_match,as@said"]
    assert scores["read.bits_per_byte"] == pytest.approx(plain["read_colours/bits_per_byte,none"])


def test_what_was_learned_is_seen_with_paired_intervals_over_the_questions(done: Path) -> None:
    found = study(done)
    for metric in ("choose.acc", "write.exact_match.strict-match"):
        change = found["difference"][metric]
        assert change["value"] == pytest.approx(found["tuned"][metric] - found["base"][metric])
        assert change["interval"][0] > 0.1
        assert (change["n"], change["test"]) == (30, "McNemar exact")
    assert found["difference"]["read.bits_per_byte"]["test"] == "paired bootstrap"
    assert found["better"]["choose.acc"] == 1
    assert found["better"]["read.bits_per_byte"] == -1


def test_a_score_that_does_not_add_up_question_by_question_has_no_interval_and_says_so(done: Path) -> None:
    found = study(done)
    assert found["tuned"]["write.chrf.strict-match"] > found["base"]["write.chrf.strict-match"]
    assert "write.chrf.strict-match" not in found["difference"]
    assert "no interval" in found["signatures"]["write.chrf.strict-match"]
    assert "no interval" not in found["signatures"]["choose.acc"]
    assert "30 of 30 questions" in found["signatures"]["choose.acc"]


def test_lm_evals_own_files_name_tasks_settings_and_models(done: Path) -> None:
    base, tuned = lm_eval_files(done, "base"), lm_eval_files(done, "tuned")
    for found in (base, tuned):
        for key in ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"):
            assert {"chosen_colours", "written_colours", "read_colours"} == found[key].keys()
        assert found["config"]["limit"] is None
        assert "samples" not in found
        assert found["lm_eval_version"] == version("lm-eval")
    assert base["config"]["model_args"] == {"pretrained": str(done / "model")}
    assert tuned["config"]["model_args"] == {"pretrained": str(done / "model"), "peft": "adapter"}


def again(place: Path, *sets: str) -> dict[str, Any]:
    """Evaluate the run once more with other settings."""
    loaded = load_recipe(str(place / "recipe.yaml"), list(sets))
    out = place / f"again-{len(list(place.iterdir()))}"
    shutil.copytree(place / "run", out)
    report = evaluate_run(loaded, out, Console(file=io.StringIO()), offline=True)
    found: dict[str, Any] = report["evaluation"]["studies"]["benchmarks"]
    return {**found, "out": out}


def test_limit_examples_and_template_are_heeded_by_each_benchmark_alone(done: Path) -> None:
    choose, write, read = (done / f"{name}.yaml" for name in ("choose", "write", "read"))
    named = f"{{task: {choose}, limit: 7, num_fewshot: 2}}, {{task: {write}, apply_chat_template: true}}, {read}"
    found = again(done, f"evaluate.benchmarks=[{named}]")
    assert found["difference"]["choose.acc"]["n"] == 7
    signatures = found["signatures"]
    assert "2 examples before each question, 7 of 30 questions" in signatures["choose.acc"]
    assert "chat template" in signatures["write.exact_match.as_said"]
    assert "chat template" not in signatures["read.bits_per_byte"]
    before = study(done)["tuned"]
    assert found["tuned"]["write.chrf.as_said"] != before["write.chrf.as_said"]
    assert found["tuned"]["read.bits_per_byte"] == before["read.bits_per_byte"]
    saved = json.loads((found["out"] / "evaluation" / "benchmarks" / "tuned.json").read_text())
    assert saved["n-shot"] == {"chosen_colours": 2, "written_colours": 0, "read_colours": 0}
    assert saved["config"]["limit"] == {"choose": 7, "write": None, "read": None}


def test_requests_that_are_cut_to_fit_the_context_are_counted(done: Path) -> None:
    (done / "long.yaml").write_text(CHOOSE + f"description: {'the sky is blue and ' * 600}\n")
    long = again(done, f"evaluate.benchmarks=[{{task: {done / 'long.yaml'}, limit: 2}}]")
    assert "8 requests without their beginning" in long["signatures"]["long.acc"]
    assert "without their beginning" not in study(done)["signatures"]["choose.acc"]


def test_a_task_that_cannot_be_run_stops_a_run_before_training(done: Path) -> None:
    (done / "exam.yaml").write_text(CHOOSE.replace("test_split: test", "test_split: exam"))
    loaded = load_recipe(str(done / "recipe.yaml"), [f"evaluate.benchmarks={done / 'exam.yaml'}"])
    with pytest.raises(DataError, match="'exam'"):
        run_pipeline(loaded, Options(out=done / "stopped", offline=True), Console(file=io.StringIO()))
    assert not (done / "stopped" / "adapter").exists()


def test_a_mistake_that_shows_while_questions_are_asked_is_told_without_a_traceback(done: Path) -> None:
    (done / "late.py").write_text("def score(row, said):\n    return {'acc': row['lost']}\n")
    (done / "late.yaml").write_text(CHOOSE + "process_results: !function late.score\n")
    with pytest.raises(DataError, match=r"late\.yaml: lm-eval cannot use the task: KeyError 'lost'"):
        again(done, f"evaluate.benchmarks={done / 'late.yaml'}")


@pytest.mark.parametrize("weighed", [True, False])
def test_a_group_has_a_score_and_an_interval_beside_those_of_its_tasks(done: Path, weighed: bool) -> None:
    few = LIKELY.replace("test_split: test", "test_split: test\nprocess_docs: !function first.ten")
    (done / "likely.yaml").write_text(few)
    (done / "first.py").write_text("def ten(rows):\n    return rows.select(range(10))\n")
    (done / "every.yaml").write_text(GROUP.replace("WEIGHED", str(weighed).lower()))
    found = again(done, f"evaluate.benchmarks={done / 'every.yaml'}")
    scores = found["tuned"]
    parts = [(scores["chosen_colours.acc"], 30), (scores["likely_colours.acc"], 10)]
    sizes = [size if weighed else 1 for _, size in parts]
    assert scores["every.acc"] == pytest.approx(np.average([value for value, _ in parts], weights=sizes))
    change = found["difference"]["every.acc"]
    assert change["value"] == pytest.approx(scores["every.acc"] - found["base"]["every.acc"])
    assert change["n"] == 40
    assert change["interval"][0] > 0
    assert {"every_colour_inner.acc", "likely_colours.perplexity"} <= found["difference"].keys()


def test_a_gate_on_a_benchmark_ends_the_run_with_its_exit_code(done: Path) -> None:
    kept = "evaluate.benchmarks=[{task: " + str(done / "choose.yaml") + "}]"
    with pytest.raises(GateFailed, match=r"benchmarks\.choose\.acc > 0\.99") as failed:
        again(done, kept, 'evaluate.gates=["benchmarks.choose.acc > 0.99"]')
    assert failed.value.exit_code == 6


def test_lm_eval_stays_quiet_and_leaves_random_numbers_alone(
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


def recipe_with(*benchmarks: Path | dict[str, Any] | str, gates: tuple[str, ...] = ()) -> Recipe:
    """A recipe of these benchmarks; its model and rows are never read."""
    named = [str(one) if isinstance(one, Path) else one for one in benchmarks]
    content = {"task": "chat", "data": {"train": "/nowhere.jsonl"}, "model": {"name": "builtin:nothing"}}
    return Recipe.model_validate({**content, "evaluate": {"benchmarks": named, "gates": list(gates)}})


def refusal(recipe: Recipe, kind: type[LlmtuneError]) -> str:
    with pytest.raises(kind) as found:
        load_benchmarks(recipe, Console(file=io.StringIO()))
    assert type(found.value) is kind
    return str(found.value)


@pytest.mark.parametrize(
    ("was", "now", "kind", "told"),
    [
        ("questions.jsonl", "lost.jsonl", DataError, "rows are not there: lost.jsonl"),
        ("questions.jsonl", "empty.jsonl", DataError, "no rows"),
        ("test_split: test", "test_split: exam", DataError, "'exam'"),
        ("{{question}}", "{{question.first.word}}", DataError, "no attribute 'first'"),
        ("metric: acc,", "metric: accurate,", RecipeError, "metric accurate is none of lm-eval's own"),
        ("metric: acc,", "metric: f1, hf_evaluate: true,", RecipeError, "fetched from a hub as code"),
        ("task: chosen", "unsafe_code: true\ntask: chosen", RecipeError, "runs the code that a model writes"),
        ("doc_to_target: answer", "doc_to_target: !function lost.target", EnvironmentProblem, "module lost"),
        ("doc_to_target: answer", "doc_to_target: !function there.lost", DataError, "no function 'lost'"),
        ("dataset_path: json", "dataset_path: someone/questions", EnvironmentProblem, "not in the cache"),
        ("output_type: multiple_choice", "output_type: guess", DataError, "guess"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_before_a_model_is_loaded(
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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [a\n x: {", "changed.yaml:2: the task file is no YAML"),
        ("hello: 1", "neither `task` nor `group`"),
        ("- 1", "no mapping"),
        ("task: a\ninclude: changed.yaml", "includes itself"),
        ("task: a\ninclude: lost.yaml", "lost.yaml: there is no such task file"),
        (None, "changed.yaml: there is no such task file"),
    ],
)
def test_a_bad_task_file_is_told_at_once_by_its_name(tasks: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tasks / "changed.yaml").write_text(text)
    with pytest.raises(DataError, match=re.escape(told)):
        check_benchmarks(recipe_with(tasks / "changed.yaml"))


def test_all_bad_task_files_are_told_together(tasks: Path) -> None:
    with pytest.raises(DataError) as found:
        check_benchmarks(recipe_with(tasks / "one.yaml", tasks / "two.yaml"))
    assert len(found.value.problems) == 2


def test_settings_that_lm_eval_would_pass_over_are_refused(tasks: Path) -> None:
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
def test_a_gate_about_no_score_of_the_benchmarks_is_refused_with_those_there_are(
    tasks: Path, gate: str, told: str
) -> None:
    assert told in refusal(recipe_with(tasks / "choose.yaml", gates=(gate,)), RecipeError)


def test_two_benchmarks_with_one_task_are_refused(tasks: Path) -> None:
    (tasks / "likely.yaml").write_text(LIKELY)
    (tasks / "one.yaml").write_text(GROUP.replace("WEIGHED", "true"))
    (tasks / "two.yaml").write_text(GROUP.replace("WEIGHED", "true").replace("every_colour", "other"))
    told = refusal(recipe_with(tasks / "one.yaml", tasks / "two.yaml"), RecipeError)
    assert "chosen_colours is in both" in told


def test_lm_eval_missing_is_told_by_the_extra_that_brings_it(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.store.lm_eval_tasks.PACKAGE", "lm_eval_that_is_not_there")
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmtune-cli\[benchmarks\]'"):
        check_benchmarks(recipe_with(tasks / "choose.yaml"))
    check_benchmarks(recipe_with())


def test_an_unknown_task_is_told_with_the_nearest_that_there_is() -> None:
    check_benchmarks(recipe_with("hellaswag", "arc_easy"))
    with pytest.raises(RecipeError, match=r"evaluate\.benchmarks\.1: lm-eval has no task 'hellaswagg'\s+Did you mean"):
        check_benchmarks(recipe_with("arc_easy", "hellaswagg"))


def test_tasks_of_a_hub_ask_for_the_network_and_files_do_not(tasks: Path) -> None:
    assert names_remote(recipe_with("hellaswag"))
    assert not names_remote(recipe_with(tasks / "choose.yaml"))
    hub = CHOOSE.replace("dataset_path: json", "dataset_path: someone/questions")
    (tasks / "hub.yaml").write_text(hub.replace("dataset_kwargs", "metadata"))
    assert names_remote(recipe_with(tasks / "hub.yaml"))
    (tasks / "far.yaml").write_text(CHOOSE.replace("questions.jsonl", "'https://example.org/q.jsonl'"))
    assert names_remote(recipe_with(tasks / "far.yaml"))
    (tasks / "group.yaml").write_text("group: g\ntask: [chosen_colours, hellaswag]\n")
    assert names_remote(recipe_with(tasks / "group.yaml"))
    assert read_task_file(tasks / "group.yaml").members == {"hellaswag"}


def test_all_that_a_task_file_rests_on_counts(tasks: Path) -> None:
    (tasks / "more").mkdir()
    (tasks / "own.py").write_text("def target(row):\n    return row['answer']\n")
    text = CHOOSE.replace("doc_to_target: answer", "doc_to_target: !function own.target").replace(
        "test: quest", "test: ../quest"
    )
    (tasks / "more" / "own.py").write_text("def target(row):\n    return row['answer']\n")
    (tasks / "more" / "inner.yaml").write_text(text)
    (tasks / "more" / "outer.yaml").write_text("include: inner.yaml\ntask: outer\n")
    names = {
        path.resolve().relative_to(tasks.resolve()).as_posix()
        for path in list_task_files(str(tasks / "more" / "outer.yaml"))
    }
    assert names == {"more/outer.yaml", "more/inner.yaml", "more/own.py", "questions.jsonl"}
    (tasks / "group.yaml").write_text("group: g\ntask: [chosen_colours]\n")
    names = {path.name for path in list_task_files(str(tasks / "group.yaml"))}
    assert names == {"group.yaml", "choose.yaml", "questions.jsonl"}
    recipe = recipe_with("hellaswag", tasks / "group.yaml")
    assert {path.name for path in suite_files(recipe)} == {"group.yaml", "choose.yaml", "questions.jsonl"}
    assert list_task_files("hellaswag") == list_task_files(str(tasks / "lost.yaml")) == []


def command_line(place: Path, *model_args: str, tasks: str) -> dict[str, float]:
    """What lm-eval's own command line says, in a process of its own, a request at a time."""
    command = ["--model", "hf", "--model_args", ",".join(["dtype=float32", *model_args]), "--tasks", tasks]
    command += ["--include_path", str(place), "--device", "cpu", "--batch_size", "1", "--output_path", "said"]
    program = Path(sys.executable).with_name("lm_eval")
    subprocess.run([program, *command], cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    newest = max((place / "said").rglob("results_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return numbers(json.loads(newest.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapter"), [("base", []), ("tuned", ["peft=run/adapter"])])
def test_scores_are_those_of_lm_evals_command_line(done: Path, name: str, adapter: list[str]) -> None:
    names = "chosen_colours,written_colours,read_colours"
    told = without_resampled(command_line(done, "pretrained=model", *adapter, tasks=names))
    assert numbers(lm_eval_files(done, name)) == pytest.approx(told, rel=1e-5)


@pytest.mark.slow
def test_scores_of_the_packaged_model_are_those_of_lm_evals_command_line(tmp_path: Path) -> None:
    from llmtune.model.builtin_models import resolve_builtin

    write_tasks(tmp_path)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        "builtin:smollm2-135m-instruct",
        write_jsonl(tmp_path / "rows.jsonl", rows_to_learn()),
        task="completion",
        data={"test": 0.0, "validation": 0.0, "deduplicate": "none"},
        train={"max_steps": 12, "num_train_epochs": None, "learning_rate": 2e-4, "batch_size": 8},
        evaluate={"metrics": None, "benchmarks": ["choose.yaml", "write.yaml", "read.yaml"]},
    )
    quiet = Console(file=io.StringIO())
    run_pipeline(load_recipe(str(recipe)), Options(out=tmp_path / "run", offline=True), quiet)
    model = resolve_builtin("smollm2-135m-instruct", quiet)
    names = "chosen_colours,written_colours,read_colours"
    for name, adapter in (("base", []), ("tuned", ["peft=run/adapter"])):
        told = without_resampled(command_line(tmp_path, f"pretrained={model}", *adapter, tasks=names))
        assert numbers(lm_eval_files(tmp_path, name)) == pytest.approx(told, rel=1e-5)
    scores = study(tmp_path)
    assert scores["base"]["choose.acc"] != scores["tuned"]["choose.acc"]


def without_resampled(told: dict[str, float]) -> dict[str, float]:
    """Leave out lm-eval's standard errors of corpus scores, in whose place paired intervals stand."""
    return {key: value for key, value in told.items() if "chrf_stderr" not in key}
