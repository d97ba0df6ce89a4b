"""A run with a teacher as a whole: kills, `verify`, `reproduce` and `--dry-run`."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console
from support.adapting import quiet
from support.models import build_llama
from support.pairs import recipe_of
from support.process import Watched, run_in_child
from support.runs import invoke
from support.task_cases import CHATS, NO_TEXT, NUMBERS
from support.training import trained_bytes

from llmtune.errors import RecipeError
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.store.verification import verify_run


def write(folder: Path) -> Path:
    """Write a recipe whose teacher is another model in the same folder."""
    student, teacher = folder / "model", folder / "teacher"
    build_llama(student)
    build_llama(teacher, seed=3)
    train = {"max_steps": 4, "num_train_epochs": None, "save_steps": 1}
    data = {"validation": 0.2, "test": 0.1}
    section = {"teacher": str(teacher), "top_k": 7, "control": False}
    return recipe_of(folder, student, CHATS, "chat", train=train, data=data, distil=section)


def train(recipe: Path, run: Path, console: Console | None = None) -> Path:
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=run, until="train"), console or quiet())
    return run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("distilled"))


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    return train(recipe, recipe.parent / "run")


def die_in_training(recipe: str, run: str) -> None:
    console = Console(file=Watched("step 2/", lambda: os.kill(os.getpid(), signal.SIGKILL)), width=200)
    train(Path(recipe), Path(run), console)


def test_a_distilled_run_killed_in_training_ends_with_the_same_bytes(recipe, finished, tmp_path):
    done = run_in_child(die_in_training, tmp_path / "killed", str(recipe), str(tmp_path / "killed"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    train(recipe, tmp_path / "killed")
    assert trained_bytes(tmp_path / "killed") == trained_bytes(finished)


def test_reproducing_a_distilled_run_gives_the_same_bytes(finished, tmp_path):
    done = invoke("reproduce", finished, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert trained_bytes(tmp_path / "again") == trained_bytes(finished)


def test_a_dry_run_says_what_the_recorded_predictions_would_take(recipe, tmp_path):
    done = invoke("run", recipe, "--dry-run", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "teach: " in done.output
    assert " of cpu" not in done.output  # its speed is not known
    planned = invoke("run", recipe, "--dry-run", "--device", "t4", "--out", tmp_path / "run")
    assert re.search(r"teach: [\d,]+ predictions of \S+ would take [\d.]+ MB and [\d.]+ s of t4", planned.output)
    assert not (tmp_path / "run").exists()


def test_verify_names_a_teacher_that_changed(tmp_path):
    run = train(write(tmp_path), tmp_path / "run")
    assert verify_run(run).failed == []
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-3}))
    assert [str(config) in str(one) for one in verify_run(run).failed] == [True]


def test_a_teacher_of_numbers_is_refused(tmp_path):
    model = build_llama(tmp_path / "model")
    section = {"teacher": str(model), "control": False}
    recipe = recipe_of(tmp_path, model, NUMBERS, "classify", **NO_TEXT, data={"validation": 0.2}, distil=section)
    with pytest.raises(RecipeError, match="numbers have no distribution"):
        train(recipe, tmp_path / "run")
