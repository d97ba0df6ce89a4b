"""`train.eval_metrics`: metrics measured during training, and the decisions based on them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.runs import finish_run, invoke
from support.training import make_recipe, read_metrics, run_training, trained_bytes

from llmtune.data.examples import load_examples
from llmtune.data.row_store import load_rows
from llmtune.evaluate.eval_inputs import EvalContext, make_inputs
from llmtune.evaluate.inference import compute_metrics, predict
from llmtune.plan import open_finished
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.run_models import Models
from llmtune.train import loop

METRICS = ["exact_match", "accuracy", "chrf", "answers_cut"]
TRAIN = {
    "learning_rate": 1e-4,
    "eval_metrics": METRICS,
    "eval_steps": 3,
    "save_total_limit": 9,
    "load_best_model_at_end": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    adapter = {"lora_dropout": 0.1}
    return finish_run(tmp_path_factory.mktemp("metrics"), tiny_llama, train=TRAIN, adapter=adapter)


def test_validation_metrics_match_those_of_evaluate_for_the_same_checkpoint(run: Path) -> None:
    lines = [line for line in read_metrics(run) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [3, 6]
    context = open_finished(run, Console(file=io.StringIO()), offline=True)
    processor = context.plan.processor
    recipe = context.plan.recipe.model_copy(update={"evaluate": EvaluateSection(metrics=tuple(METRICS))})
    rows, examples = load_rows(run / "data" / "rows"), load_examples(run / "data" / "examples")
    inputs = make_inputs(rows, examples, context.plan.task, processor, recipe, "validation")
    models = Models(context)
    with models.tuned() as model:
        asked = EvalContext(recipe, context.plan.task, processor, inputs, "cpu", context.console)
        answers = predict(model, "tuned", asked, models.packs)
    found = {name: one.value for name, one in compute_metrics(asked, answers, answers).items() if name in METRICS}
    assert lines[-1]["validation_metrics"] == pytest.approx(found)
    assert found["answers_cut"] > 0
    report = (run / "report.html").read_text()
    assert "chrf of validation rows" in report


def test_a_run_with_metrics_and_row_losses_resumes_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / "runs" / "tiny"
    for gone in ("checkpoints/step-6", "adapter"):
        shutil.rmtree(copy / gone)
    (copy / "row_losses.npz").unlink()
    done = invoke("run", tmp_path / "copy" / "tiny.yaml", "--out", copy)
    assert done.exit_code == 0, done.output
    assert "Resuming from step 3 of" in done.stderr
    assert trained_bytes(copy) == trained_bytes(run)
    scores = [[line.get("validation_metrics") for line in read_metrics(folder)] for folder in (copy, run)]
    assert scores[0] == scores[1]
    with np.load(copy / "row_losses.npz") as resumed, np.load(run / "row_losses.npz") as whole:
        for name in ("row", "loss", "excess", "seen"):
            assert (resumed[name] == whole[name]).all()
        assert set(whole["seen"]) == {2}


@pytest.mark.parametrize(
    ("metric", "scores", "best"), [("exact_match", [0.2, 0.6, 0.5, 0.4, 0.9], 4), ("perplexity", [9.0, 7, 8, 7.5], 4)]
)
def test_the_best_checkpoint_and_early_stopping_follow_the_named_metric(
    metric: str, scores: list[float], best: int, examples: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: Any
) -> None:
    train = {"eval_metrics": [metric], "metric_for_best_model": metric, "eval_steps": 2, "early_stopping_patience": 2}
    recipe = make_recipe(tmp_path, tiny_llama, train={**train, "num_train_epochs": 3})
    left = iter(scores)
    monkeypatch.setattr(loop, "metrics_of_validation", lambda *arguments: lambda: {metric: next(left)})
    trained = run_training(tmp_path / "run", recipe, examples)
    assert (trained.best_step, trained.steps) == (best, best + 4)
    assert trained.stopped_early == f"{metric} did not improve in 2 validations; best {scores[1]:.4f} (step {best})"
    losses = {
        line["step"]: line["validation_loss"] for line in read_metrics(tmp_path / "run") if "validation_loss" in line
    }
    assert trained.validation_loss == losses[best]


def test_of_equal_checkpoints_the_last_is_the_best(
    examples: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: Any
) -> None:
    train = {"eval_metrics": ["exact_match"], "metric_for_best_model": "exact_match", "num_train_epochs": 3}
    recipe = make_recipe(tmp_path, tiny_llama, train=train)
    left = iter([0.6, 0.6, 0.2])
    monkeypatch.setattr(loop, "metrics_of_validation", lambda *arguments: lambda: {"exact_match": next(left)})
    trained = run_training(tmp_path / "run", recipe, examples)
    assert trained.best_step == trained.steps * 2 // 3


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["train.eval_metrics=[exact_mach]"], "Did you mean"),
        (["train.eval_metrics=[loss]"], "'loss' is measured anyway"),
        (["train.metric_for_best_model=chrf"], "Add chrf to train.eval_metrics"),
        (
            ["train.eval_metrics=[chrf]", "data.validation=0"],
            "'train.eval_metrics' has no effect without validation rows",
        ),
        (
            ["train.eval_metrics=[chrf]", "train.metric_for_best_model=chrf", "train.load_best_model_at_end=false"],
            "'train.metric_for_best_model' has no effect if nothing uses the best checkpoint",
        ),
    ],
)
def test_invalid_and_unused_metrics_are_refused(run: Path, sets: list[str], told: str) -> None:
    plain = run.parent.parent / "plain.yaml"
    plain.write_text((run.parent.parent / "tiny.yaml").read_text().replace("  load_best_model_at_end: false\n", ""))
    options = [word for one in ["train.eval_metrics=[]", *sets] for word in ("--set", one)]
    done = invoke("recipes", "check", plain, *options)
    assert done.exit_code == 2, done.output
    assert told in " ".join(done.stderr.split())


def test_rows_that_lack_what_a_metric_needs_are_an_error_before_training(run: Path, tmp_path: Path) -> None:
    sets = ["--set", "train.eval_metrics=[choice_accuracy]"]
    done = invoke("run", run.parent.parent / "tiny.yaml", "--out", tmp_path / "run", *sets)
    assert done.exit_code == 3, done.output
    assert "the validation rows lack what choice_accuracy needs" in " ".join(done.stderr.split())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"]["train"]["state"] == "failed"
