"""`reproduce`: the same bytes from the lock, also at another path; differences are named, changed inputs refused."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.runs import invoke, write_recipe, write_sums

from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.pipeline import run_pipeline
from llmtune.recipe.data_section import Source
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import change_paths
from llmtune.reproduce import Tolerances, at_commits, explain_difference, move_recipe, reproduce
from llmtune.store.run_folder import read_run
from llmtune.store.run_lock import LOCK
from llmtune.store.run_request import RunRequest

ADAPTER = "adapter/adapter_model.safetensors"
BUDGET = 128
"""Tokens of a micro-batch: fewer than this machine would choose."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with rows, recipe, model and a run with its own budget, moved from its original path."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("made") / "project"
    made.mkdir()
    shutil.copytree(tiny_llama, made / "model")
    write_sums(made / "rows.jsonl")
    sections: dict[str, Any] = {"train": {"num_train_epochs": 1}, "evaluate": {"gates": ["accuracy >= 0"]}}
    recipe = write_recipe(made / "tiny.yaml", "./model", "rows.jsonl", **sections)
    options = RunRequest(out=made / "runs/tiny", findings={"micro_batch_tokens": BUDGET})
    run_pipeline(load_recipe(recipe), options, Console(file=io.StringIO()))
    return made.rename(tmp_path_factory.mktemp("moved") / "project")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def again(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    return reproduce(run, Console(file=io.StringIO()), out=out, **options)


@pytest.fixture(scope="module")
def reproduced(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("out") / "again"
    return again(project / "runs/tiny", out), out


def test_a_moved_run_is_reproduced_byte_for_byte_with_its_budget(
    project: Path, reproduced: tuple[dict[str, Any], Path]
) -> None:
    result, out = reproduced
    assert result["judged_by"] == "bytes"
    assert result["equal"]
    assert result["first_difference"] is None
    assert (out / ADAPTER).read_bytes() == (project / "runs/tiny" / ADAPTER).read_bytes()
    assert {score["name"] for score in result["scores"]} >= {"base.loss", "tuned.loss", "tuned.exact_match"}
    assert json.loads((out / "reproduction.json").read_text())["equal"]
    assert read_run(project / "runs/tiny").facts("select")["plan"]["tokens"] > BUDGET
    assert [read_run(run).findings["micro_batch_tokens"] for run in (project / "runs/tiny", out)] == [BUDGET, BUDGET]


def test_scores_of_answers_by_vllm_are_not_reproduced(project: Path, tmp_path: Path) -> None:
    run = shutil.copytree(project / "runs/tiny", project / "runs/by_vllm")
    scores = run / "evaluation/evaluation.json"
    evaluation = json.loads(scores.read_text())
    evaluation["tuned"]["exact_match"] = 0.5
    scores.write_text(json.dumps(evaluation))
    assert not again(run, tmp_path / "own", tolerances=Tolerances(score=0))["equal"]
    evaluation["signatures"]["engine"] = "vLLM 0.33.0, with the adapter on its base"
    scores.write_text(json.dumps(evaluation))
    console = Console(file=io.StringIO())
    result = reproduce(run, console, out=tmp_path / "again")
    assert "its scores are not reproduced: vLLM generated the answers" in console.file.getvalue()
    assert result["equal"]
    assert not result["scores"]
    assert result["losses"]


def test_differences_are_named_and_judged_by_bytes(
    project: Path, reproduced: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    out = shutil.copytree(reproduced[1], tmp_path / "out")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] += 1e-6
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = json.loads((out / "evaluation/evaluation.json").read_text())
    scores["tuned"]["loss"] += 1e-6
    changed = json.dumps(scores)
    result = hold_against(project / "runs/tiny", out, changed)
    assert not result["equal"]
    problem = explain_difference(result)
    assert "training: loss of step 2: was" in problem.what
    assert "something outside the lock" in str(problem.fix)


def test_on_other_machines_losses_and_scores_are_compared_within_tolerances(
    project: Path, reproduced: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    run = shutil.copytree(project / "runs/tiny", tmp_path / "run")
    lock = json.loads((run / LOCK).read_text())
    lock["packages"]["torch"] = "1.0"
    (run / LOCK).write_text(json.dumps(lock))
    out = shutil.copytree(reproduced[1], tmp_path / "out")
    scores = json.loads((out / "evaluation/evaluation.json").read_text())
    scores["tuned"]["accuracy"] += 0.01
    near = hold_against(run, out, json.dumps(scores))
    assert near["judged_by"] == "tolerance"
    assert near["equal"]
    assert [setting["name"] for setting in near["settings"]] == ["torch"]
    far = hold_against(run, out, json.dumps(scores), Tolerances(score=0.001))
    assert not far["equal"]
    assert "torch was 1.0" in str(explain_difference(far).fix)


def hold_against(run: Path, out: Path, scores: str, tolerances: Tolerances | None = None) -> dict[str, Any]:
    """Compare without training: the part after `run_pipeline`."""
    from llmtune.reproduce import compare_with_original
    from llmtune.store.run_lock import read_lock
    from llmtune.store.verification import verify_run

    (out / "evaluation/evaluation.json").write_text(scores)
    return compare_with_original(read_run(run), out, read_lock(run / LOCK), verify_run(run), tolerances or Tolerances())


def test_changed_data_model_and_recipe_are_refused_before_training(project: Path, tmp_path: Path) -> None:
    place = shutil.copytree(project, tmp_path / "project")
    kinds = {"rows.jsonl": DataError, "model/config.json": EnvironmentProblem, "runs/tiny/recipe.yaml": RecipeError}
    for name, error in kinds.items():
        path = place / name
        text = path.read_text()
        path.write_text(text.replace("seed: 7", "seed: 8") + " ")
        with pytest.raises(error, match="changed since the run"):
            again(place / "runs/tiny", tmp_path / "out")
        path.write_text(text)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_reproduced_into_itself_or_before_training(project: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Choose another folder"):
        again(project / "runs/tiny", project / "runs" / ".." / "runs" / "tiny")
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": "aa", "steps": {}, "findings": {}}))
    done = invoke("reproduce", tmp_path)
    assert done.exit_code == 2
    assert "no trained model yet" in done.stderr


def test_every_path_of_a_recipe_moves_with_its_run(tmp_path: Path) -> None:
    """Every key that names a file or folder is moved; a missing one would make the run irreproducible."""
    before, now = tmp_path / "before", tmp_path / "now"
    folders = ["model", "miner", "start", "champion"]
    files = [*("rows.jsonl", "test-1.jsonl", "passages.txt", "chat.jinja", "metrics.py", "texts.txt", "quiz.jsonl")]
    files += ["words.csv", "labelled.jsonl", "choose.yaml"]
    for name in (*folders, "run"):
        (before / name).mkdir(parents=True)
    for name in files:
        (before / name).touch()
    recipe: dict[str, Any] = {
        "task": "embed",
        "model": {"name": "./model", "chat_template": "chat.jinja"},
        "data": {"train": "rows.jsonl", "test": "test-*.jsonl", "corpus": ["passages.txt", "hub:owner/passages"]},
        "adapter": {"start_from": "start"},
        "evaluate": {
            "metrics": ["ndcg@10", "metrics.py:length"],
            "champion": "champion",
            "forgetting": {"texts": ["texts.txt"], "questions": ["quiz.jsonl"]},
            "fairness": {"swaps": ["words.csv"]},
            "judge": {"endpoint": "http://localhost/v1", "model": "m", "labelled": "labelled.jsonl"},
            "benchmarks": "choose.yaml",
        },
    }
    recipe["data"]["negatives"] = {"mine": 2, "model": "./miner"}
    written = change_paths(Recipe.model_validate(recipe), lambda key, path, resolve: resolve(path, before))
    loaded = LoadedRecipe(written, {}, before / "recipe.yaml", "")
    before.rename(now)
    lock: Any = {"folder": str(before / "run"), "data": {"files": [{"source": "hub:owner/passages", "commit": "abc"}]}}
    moved = move_recipe(loaded, lock, now / "run").recipe
    text = moved.model_dump_json()
    assert str(before) not in text
    for name in (*folders, *files):
        assert str(now / name.replace("1", "*")) in text, name
    assert at_commits(moved, lock).data.corpus == (
        Source(path=str(now / "passages.txt")),
        Source(path="hub:owner/passages", revision="abc"),
    )
