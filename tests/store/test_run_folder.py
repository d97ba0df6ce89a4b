"""Test the run folder: refusals, the step cache, the lock against a second process, folders of an older version."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.errors import RecipeError
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.store.run_folder import RunFolder, open_run, read_run, recipe_of_run
from llmtune.store.verification import verify_run

FACTS = {"rows_in": 1, "kept": {"train": 1}, "dropped": {}}


def prepare(run: RunFolder, inputs: str = "inputs") -> bool:
    """Run a step that writes a file; return whether it was skipped."""
    with run.step("prepare", inputs, ["data"]) as step:
        if not step.skipped:
            (run.path / "data").mkdir(exist_ok=True)
            (run.path / "data" / "rows").write_text("one")
            step.facts.update(FACTS)
    return step.skipped


def test_a_step_is_skipped_only_with_the_same_inputs_and_untouched_outputs(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "aa") as run:
        assert not prepare(run)
    with open_run(tmp_path / "run", "aa") as run:
        assert prepare(run)
        assert run.facts("prepare") == FACTS
        (run.path / "data" / "rows").write_text("two")
        assert not prepare(run)
        assert not prepare(run, "other inputs")
        with run.step("prepare", "other inputs", always=True) as step:
            assert not step.skipped


def test_a_step_that_failed_runs_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "aa") as run:
        with pytest.raises(ValueError, match="stop"), run.step("train", "inputs"):
            raise ValueError("stop")
        assert not run.is_valid("train", "inputs")
    assert read_run(tmp_path / "run").manifest["steps"]["train"]["state"] == "failed"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("of-another-recipe", {}, r"another recipe \(bbbbbbbb, not aaaaaaaa\)"),
        ("with-other-files", {}, r"thesis\.tex"),
        ("new", {"resume": True}, "nothing to resume"),
    ],
)
def test_another_run_or_folder_is_refused_and_left_unchanged(
    tmp_path: Path, name: str, options: dict[str, bool], words: str
) -> None:
    with open_run(tmp_path / "of-another-recipe", "bbbbbbbb00") as run:
        prepare(run)
    (tmp_path / "with-other-files").mkdir()
    (tmp_path / "with-other-files" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match=words), open_run(tmp_path / name, "aaaaaaaa00", **options):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_fresh_removes_the_old_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "aa") as run:
        prepare(run)
    with open_run(tmp_path / "run", "aa", fresh=True) as run:
        assert not (run.path / "data").exists()
        assert not run.is_valid("prepare", "inputs")


def test_a_folder_without_finished_steps_or_with_fresh_is_accepted(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "run", "aa") as run,
        pytest.raises(ValueError, match="no disk"),
        run.step("prepare", "inputs"),
    ):
        raise ValueError("no disk")
    with open_run(tmp_path / "run", "bb") as run:
        assert run.manifest["fingerprint"] == "bb"
        prepare(run)
    with open_run(tmp_path / "run", "cc", fresh=True) as run:
        assert not (run.path / "data").exists()
    assert read_run(tmp_path / "run").manifest["fingerprint"] == "cc"


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    run = f"pathlib.Path({str(tmp_path / 'run')!r})"
    code = f"import pathlib\nfrom llmtune.store.run_folder import open_run\nwith open_run({run}, 'aa'): pass"
    with open_run(tmp_path / "run", "aa"):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"another llmtune process is using this folder: process {os.getpid()}, started at" in other.stderr


@pytest.mark.parametrize(("manifest", "words"), [(None, "not a run folder"), ('{"steps": ', "not a run folder")])
def test_a_folder_that_is_not_a_run_is_named(tmp_path: Path, manifest: str | None, words: str) -> None:
    if manifest:
        (tmp_path / "run.json").write_text(manifest)
    with pytest.raises(RecipeError, match=words):
        read_run(tmp_path)
    with pytest.raises(RecipeError, match="run folder not found"):
        read_run(tmp_path / "missing")


def test_a_run_folder_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    run = shutil.copytree(Path(__file__).parent / "run-0.1.0", tmp_path / "run")
    folder = read_run(run)
    assert folder.manifest["llmtune"] == "0.1.0"
    assert folder.is_valid("evaluate", folder.manifest["steps"]["evaluate"]["inputs"])
    assert [timing.name for timing in folder.timings()] == [
        "prepare",
        "encode",
        "select",
        "adapt",
        "train",
        "evaluate",
    ]
    loaded = recipe_of_run(folder, ["generation.max_new_tokens=5"])
    assert loaded.recipe.generation.max_new_tokens == 5
    assert (loaded.origins["adapter.r"], loaded.origins["train.optim"]) == ("tiny.yaml:1", "default")
    assert loaded.fingerprint == folder.manifest["fingerprint"]
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert evaluation.tuned["loss"] < evaluation.base["loss"]
    states = {(finding.kind, finding.state) for finding in verify_run(run).findings}
    assert {("lock", "same"), ("recipe", "same"), ("evaluation", "same"), ("adapter", "missing")} <= states
    assert ("recipe", "changed") not in states
