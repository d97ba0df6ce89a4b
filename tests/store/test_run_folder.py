"""The run folder: refusals, the step cache, the lock against a second process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.store.run_folder import open_run, read_run


def test_a_step_is_valid_only_with_the_same_inputs_and_untouched_outputs(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "aa") as run:
        with run.step("prepare", "inputs", ["data"]) as facts:
            (run.path / "data").mkdir()
            (run.path / "data" / "rows").write_text("one")
            facts["rows"] = 1
        assert run.is_valid("prepare", "inputs")
        assert not run.is_valid("prepare", "other inputs")
        (run.path / "data" / "rows").write_text("two")
        assert not run.is_valid("prepare", "inputs")


def test_a_step_that_failed_is_not_valid(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "aa") as run:
        with pytest.raises(ValueError, match="stop"), run.step("train", "inputs"):
            raise ValueError("stop")
        assert not run.is_valid("train", "inputs")
    assert read_run(tmp_path / "run").manifest["steps"]["train"]["state"] == "failed"


def test_the_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "aaaaaaaa00"):
        pass
    with pytest.raises(RecipeError, match="another recipe"), open_run(tmp_path / "run", "bbbbbbbb00"):
        pass


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match=r"thesis\.tex"), open_run(tmp_path, "aa"):
        pass
    assert (tmp_path / "thesis.tex").exists()


def test_resume_without_anything_to_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to resume"), open_run(tmp_path / "run", "aa", resume=True):
        pass


def test_fresh_forgets_what_was_there(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "aa") as run, run.step("prepare", "inputs", ["data"]):
        (run.path / "data").mkdir()
    with open_run(tmp_path / "run", "aa", fresh=True) as run:
        assert not (run.path / "data").exists()
        assert not run.is_valid("prepare", "inputs")


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = f"pathlib.Path({str(tmp_path / 'run')!r})"
    code = f"import pathlib\nfrom llmtune.store.run_folder import open_run\nwith open_run({run}, 'aa'): pass"
    with open_run(tmp_path / "run", "aa"):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another llmtune process" in other.stderr
    assert EnvironmentProblem.exit_code == 4


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a run folder"):
        read_run(tmp_path)
    with pytest.raises(RecipeError, match="no such run folder"):
        read_run(tmp_path / "missing")


def test_a_damaged_manifest_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"steps": {}})[:-3])
    with pytest.raises(RecipeError, match="not a run folder"):
        read_run(tmp_path)
