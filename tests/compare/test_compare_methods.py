"""`llmtune compare RECIPE --methods`: one recipe trained with each on the same budget, in separate processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import invoke, llmtune, write_recipe

from llmtune.compare.compare_methods import (
    MethodOptions,
    TrialBug,
    check_out_folder,
    default_out,
    plan_trials,
    read_methods,
    read_rates,
    trial_error,
)
from llmtune.errors import EnvironmentProblem, RecipeError, Stopped, TrainingError
from llmtune.store.atomic_files import read_json

pytestmark = pytest.mark.slow

Train = Callable[..., Path]
BRIEF = ("--set", "train.num_train_epochs=null", "--set", "train.max_steps=2")


def asked(*methods: str, sets: tuple[str, ...] = (), **rates: float) -> MethodOptions:
    return MethodOptions(methods or ("full", "lora", "qlora"), rates, sets)


def test_methods_differ_only_in_the_method_and_the_learning_rate_of_full(place: Path) -> None:
    own, trials = plan_trials(str(place / "tiny.yaml"), asked())
    assert [trial.loaded.recipe.adapter.method for trial in trials] == ["full", "lora", "qlora"]
    assert [trial.loaded.recipe.train.learning_rate for trial in trials] == [0.001, 0.01, 0.01]
    assert [trial.rate for trial in trials] == ["a tenth of the recipe's", "the recipe's", "the recipe's"]
    same = own.recipe.model_dump(exclude={"adapter": True, "train": {"learning_rate"}})
    for trial in trials:
        assert trial.loaded.recipe.model_dump(exclude={"adapter": True, "train": {"learning_rate"}}) == same


def test_an_explicit_learning_rate_counts(place: Path) -> None:
    _, trials = plan_trials(str(place / "tiny.yaml"), asked("full", "lora", full=2e-5))
    assert [trial.loaded.recipe.train.learning_rate for trial in trials] == [2e-5, 0.01]
    assert trials[0].rate == "--learning-rate"


def test_the_learning_rate_of_a_full_recipe_applies_to_full(place: Path, tmp_path: Path) -> None:
    full = {"method": "full", "r": None, "lora_alpha": None}
    recipe = write_recipe(tmp_path / "full.yaml", "./model", place / "rows.jsonl", adapter=full)
    _, trials = plan_trials(str(recipe), asked("full", "lora"))
    assert [trial.loaded.recipe.train.learning_rate for trial in trials] == pytest.approx([0.01, 0.1])


def test_keys_that_a_method_does_not_read_are_reset(place: Path) -> None:
    sets = ("adapter.bnb_4bit_quant_type=fp4", "adapter.method=qlora", "train.loraplus_lr_ratio=4", "deploy=[merged]")
    sets = (*sets, "adapter.rank_pattern={q_proj: 2}")
    _, (full, lora, qlora) = plan_trials(str(place / "tiny.yaml"), asked(sets=sets))
    assert full.loaded.recipe.train.loraplus_lr_ratio is None
    assert lora.loaded.recipe.adapter.rank_pattern == {"q_proj": 2}
    assert (lora.loaded.recipe.adapter.r, qlora.loaded.recipe.adapter.bnb_4bit_quant_type) == (4, "fp4")
    assert {trial.loaded.recipe.deploy.products for trial in (full, lora, qlora)} == {()}


def test_what_a_method_cannot_do_is_reported_before_training(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"with method qlora: .*pissa"):
        plan_trials(str(place / "tiny.yaml"), asked(sets=("adapter.init_lora_weights=pissa",)))


@pytest.mark.parametrize(
    ("text", "said"),
    [("lora,ful", "unknown method 'ful'"), ("lora", "a single method"), ("lora,lora", "named twice"), ("", "single")],
)
def test_invalid_methods_are_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_methods(text)
    assert read_methods(" full, lora ") == ("full", "lora")


@pytest.mark.parametrize("text", ["full", "qlora=1e-4", "full=fast", "=1"])
def test_invalid_learning_rates_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="METHOD=NUMBER"):
        read_rates([text], ("full", "lora"))
    assert read_rates(["full=2e-5"], ("full", "lora")) == {"full": 2e-5}
    with pytest.raises(RecipeError, match="'full' is given twice"):
        read_rates(["full=2e-5", "full=1e-5"], ("full", "lora"))


def test_a_learning_rate_out_of_range_is_refused(place: Path) -> None:
    with pytest.raises(RecipeError, match="learning_rate"):
        plan_trials(str(place / "tiny.yaml"), asked("full", "lora", full=-1.0))


def test_other_learning_rates_use_another_folder(place: Path) -> None:
    loaded, _ = plan_trials(str(place / "tiny.yaml"), asked())
    plain, other = default_out(loaded, {}), default_out(loaded, {"full": 1e-5})
    assert plain.name.startswith("tiny-compare-")
    assert plain != other


def test_a_folder_with_other_contents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"thesis\.tex"):
        check_out_folder(tmp_path)
    with pytest.raises(RecipeError, match="is a file"):
        check_out_folder(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("code", "said", "kind", "exit_code"),
    [
        (5, {"error": {"problems": [{"what": "diverged", "where": "step 3", "fix": None}]}}, TrainingError, 5),
        (-9, None, EnvironmentProblem, 4),
        (143, None, Stopped, 143),
        (1, None, TrialBug, None),
    ],
)
def test_a_trials_end_is_reported_with_its_method(
    tmp_path: Path, code: int, said: Any, kind: type[Exception], exit_code: int | None
) -> None:
    (tmp_path / "said").write_text(json.dumps(said) if said else "")
    with (tmp_path / "said").open() as file:
        error = trial_error("qlora", code, file)
    assert isinstance(error, kind)
    assert "qlora" in str(error)
    assert getattr(error, "exit_code", None) == exit_code


def test_full_and_lora_are_compared(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    command = ["compare", "tiny.yaml", "--methods", "full,lora", *BRIEF, "--out", "two", "--json"]
    done = invoke(*command, "--set", "evaluate.gates=['loss < 0']")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    full, lora = made["runs"]
    assert [run["name"] for run in made["runs"]] == ["full", "lora"]
    assert full["trainable"] == full["parameters"] > lora["trainable"]
    assert full["disk_bytes"] > lora["disk_bytes"] > 0
    assert full["steps"] == lora["steps"] == 2
    assert full["base"] == lora["base"]
    assert min(run["train_seconds"] for run in made["runs"]) > 0
    assert min(run["peak_bytes"] for run in made["runs"]) > 50_000_000
    assert [gate["passed"] for run in made["runs"] for gate in run["gates"]] == [False, False]
    assert "full 0.001 (a tenth of the recipe's)" in " ".join(made["notes"])
    assert (
        len({read_json(place / "two" / run["name"] / "data/rows/rows.json")["content_hash"] for run in made["runs"]})
        == 1
    )
    assert (made["pairs"][0]["first"], made["pairs"][0]["second"]) == ("full", "lora")
    assert (place / "two" / "compare.svg").exists()


@pytest.mark.slow
def test_a_stopped_or_killed_comparison_resumes(place: Path) -> None:
    command = ["compare", "tiny.yaml", "--methods", "lora,qlora", *BRIEF, "--out", "stubborn"]
    folders = [place / "stubborn" / method for method in ("lora", "qlora")]
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtune", *command],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (folders[0] / "run.json").exists():
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (143 if number == signal.SIGTERM else -number), said
        wait_until_free(folders[0])
    assert llmtune(*command, "--resume", cwd=place).returncode == 0
    again = llmtune(*command, cwd=place)
    assert again.returncode == 0
    assert again.stderr.count("train unchanged, skipped") == 2


def wait_until_free(run: Path) -> None:
    """Wait until no process holds the run folder: a trial must not outlive its parent."""
    import fcntl

    deadline = time.monotonic() + 30
    with (run / ".lock").open("a") as hold:
        while True:
            try:
                fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the trial went on without its parent"
                time.sleep(0.1)
            else:
                return


def test_nothing_to_resume_is_reported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    done = invoke("compare", "tiny.yaml", "--methods", "full,lora", "--out", "nowhere", "--resume")
    assert done.exit_code == 2
    assert "nothing to resume" in done.stderr
    assert not (place / "nowhere").exists()


@pytest.mark.slow
def test_an_error_of_a_method_ends_the_comparison_with_its_exit_code(place: Path) -> None:
    (place / "broken.jsonl").write_text('{"messages": []}\n' * 5)
    sets = ("--set", f"data.train={place}/broken.jsonl")
    done = llmtune("compare", "tiny.yaml", "--methods", "lora,full", *sets, "--out", "broken", "--json", cwd=place)
    assert done.returncode == 3
    problems = json.loads(done.stdout)["error"]["problems"]
    assert problems
    assert all(problem["what"].startswith("with method lora") for problem in problems)
    assert "Traceback" not in done.stderr
