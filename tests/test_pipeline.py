"""The complete pipeline on a tiny model: equal bytes, no network, no secret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import invoke, write_recipe, write_sums

SECRET = "hf_" + "s3cret" * 6
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""Environment variables of libraries that llmtune sets."""
WITHOUT_SOCKETS = """
import socket, sys
def refuse(*arguments, **options):
    raise OSError("sockets are blocked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from llmtune.cli import main
main()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with the recipe and one finished run in it, made with sockets blocked and secrets in the environment."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder / "tiny.yaml", tiny_llama, write_sums(folder / "rows.jsonl", 120))
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
    command = [sys.executable, "-c", WITHOUT_SOCKETS, "run", "tiny.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stderr + done.stdout
    return folder


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_with_blocked_sockets_writes_the_complete_run_folder(finished: Path) -> None:
    names = {path.name for path in (finished / "run").iterdir()}
    wanted = {"recipe.yaml", "llmtune.lock", "run.json", "data", "adapter", "checkpoints", "evaluation"}
    assert wanted | {"metrics.jsonl", "report.html", "report.md", "report.json", "junit.xml"} <= names
    report = json.loads((finished / "run" / "report.json").read_text())
    assert {"recipe", "task", "steps", "data", "model", "adapter", "train", "evaluation", "gates"} <= report.keys()
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    assert set(report["evaluation"]["difference"]) == {"loss", "accuracy", "exact_match", "answers_cut"}
    assert {"value", "interval", "p", "n", "test"} == report["evaluation"]["difference"]["loss"].keys()
    assert sum(report["data"]["kept"].values()) + sum(report["data"]["dropped"].values()) == report["data"]["rows_in"]


def test_the_same_recipe_twice_gives_equal_bytes(here: Path) -> None:
    """In this process, compared with the run in a separate process."""
    done = invoke("train", "tiny.yaml", "--out", "twin")
    assert done.exit_code == 0, done.stderr
    assert adapter_bytes(here / "twin") == adapter_bytes(here / "run")


def test_no_file_of_a_run_contains_a_secret_of_the_environment(finished: Path) -> None:
    files = [path for path in (finished / "run").rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_generate_and_chat_answer_as_in_the_evaluation(here: Path) -> None:
    lines = (here / "run/evaluation/predictions.jsonl").read_text().splitlines()
    row = next(line for line in map(json.loads, lines) if line["tuned"].strip())
    prompt = row["prompt"].removeprefix("user: ")
    done = invoke("generate", "run", "--prompt", prompt, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["text"].strip() == row["tuned"].strip()
    talk = invoke("chat", "run", stdin=f"{prompt}\n/reset\n{prompt}\n/quit\n")
    assert talk.exit_code == 0, talk.stderr
    assert talk.stdout.split() == row["tuned"].split() * 2
