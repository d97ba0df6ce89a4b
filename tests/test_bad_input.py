"""Bad input at the command line: the right exit code, place, cause and cure, and never a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.runs import invoke, write_recipe
from typer.testing import Result

import llmtune.deploy.gguf_readers as gguf_readers


@pytest.fixture
def model(here: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_llama, here / "model")


def expect(result: Result, code: int, *words: str) -> None:
    shown = " ".join(result.stderr.split())
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert "Traceback" not in shown
    for word in words:
        assert word in shown, shown


def run_with(rows: Path, model_folder: Path, *arguments: str, command: str = "run", **sections: Any) -> Result:
    write_recipe(Path("tiny.yaml"), model_folder, rows, **sections)
    return invoke(command, "tiny.yaml", "--out", "run", *arguments)


def test_a_model_that_cannot_become_a_gguf_file_is_refused_before_training(
    here: Path, tiny_gpt2: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_readers, "has_llama", lambda: False)
    rows = [json.dumps({"text": f"The quick brown fox number {k}."}) + "\n" for k in range(40)]
    (here / "text.jsonl").write_text("".join(rows))
    result = run_with(here / "text.jsonl", tiny_gpt2, task="completion", deploy=["gguf"])
    expect(result, 4, "llama.cpp's converter cannot write this model", "llmtune deploy merge RUN")
    assert not (here / "run" / "checkpoints").exists()
    monkeypatch.setattr(gguf_readers, "READ_BY_TRANSFORMERS", ())
    result = run_with(here / "text.jsonl", tiny_llama, "--fresh", task="completion", deploy=["gguf"])
    expect(result, 4, "only llama.cpp reads GGUF files of type 'llama'", "pip install llama-cpp-python")
    assert not (here / "run" / "checkpoints").exists()


def test_an_invalid_run_folder_is_refused(here: Path, chat_rows: Path, model: Path) -> None:
    expect(run_with(chat_rows, model, "--resume"), 2, "resume")
    (here / "file").touch()
    expect(invoke("run", "tiny.yaml", "--out", "file"), 2, "file", "--out")
    expect(invoke("run", "tiny.yaml", "--out", "/sys/llmtune/run"), 4, "/sys/llmtune", "--out")
    expect(run_with(chat_rows, model, command="prepare"), 0)
    expect(run_with(chat_rows, model, command="prepare", seed=8), 2, "another recipe", "--out")


def test_a_missing_recipe_is_a_usage_error(here: Path) -> None:
    expect(invoke("run", "quickstar"), 2, "quickstar", "quickstart")


def test_errors_are_also_available_as_json(here: Path, model: Path) -> None:
    result = run_with(here / "missing.jsonl", model, "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == 3
    assert "missing.jsonl" in json.dumps(error["problems"])
