"""The whole pipeline on a tiny model: equal bytes, no network, no secret, kill and go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.process import run_until
from support.runs import invoke, llmtune, write_recipe, write_sums

SECRET = "hf_" + "s3cret" * 6
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""Of the libraries, which llmtune sets by itself."""
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


def test_a_run_with_sockets_blocked_leaves_the_folder_that_the_design_describes(finished: Path) -> None:
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
    """In this process, beside the run in a process of its own."""
    done = invoke("train", "tiny.yaml", "--out", "twin")
    assert done.exit_code == 0, done.stderr
    assert adapter_bytes(here / "twin") == adapter_bytes(here / "run")


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_no_file_of_a_run_holds_a_secret_of_the_environment(finished: Path) -> None:
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


@pytest.mark.slow
def test_a_run_killed_at_ten_moments_ends_with_the_same_bytes(finished: Path) -> None:
    run = ["run", "tiny.yaml", "--set", "train.save_steps=5", "--out"]
    whole = run_until(10_000, finished, *run, "whole")
    assert whole.returncode == 0, whole.stderr
    total = 10_000 - int(whole.stdout.rsplit(":", 1)[1])
    moments = sorted(random.Random(1).sample(range(1, total), 10))
    for moment in moments:
        out = f"killed-{moment}"
        assert run_until(moment, finished, *run, out).returncode == -signal.SIGKILL
        again = llmtune(*run, out, cwd=finished)
        assert again.returncode == 0, (moment, again.stderr)
        assert adapter_bytes(finished / out) == adapter_bytes(finished / "whole"), moment
        assert losses(finished / out) == losses(finished / "whole"), moment
        answers = [(finished / name / "evaluation/predictions.jsonl").read_bytes() for name in (out, "whole")]
        assert answers[0] == answers[1], moment


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(finished: Path) -> None:
    run = ["run", "tiny.yaml", "--set", "train.save_steps=5", "--out", "stubborn"]
    seconds = random.Random(2)
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtune", *run], cwd=finished, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(seconds.uniform(3.0, 9.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = llmtune(*run, cwd=finished)
    assert last.returncode == 0, last.stderr
    once = llmtune(*run[:-1], "once", cwd=finished)
    assert once.returncode == 0, once.stderr
    assert adapter_bytes(finished / "stubborn") == adapter_bytes(finished / "once")
    assert losses(finished / "stubborn") == losses(finished / "once")
