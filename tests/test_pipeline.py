"""The whole pipeline on a tiny model: skips, equal bytes, plain PEFT, kill and go on, no network."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.renames import run_until
from support.runs import llmtune, write_recipe

from llmtune.model.processor import load_processor
from llmtune.session import Models, open_finished

SECRET = "hf_" + "s3cret" * 6


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(120):
            question = f"What comes after {i} and before {i + 2}?"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": str(i + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Path) -> Path:
    """A folder with the recipe and one finished run in it."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder / "tiny.yaml", tiny_llama, rows)
    done = llmtune("run", "tiny.yaml", "--out", "run", cwd=folder, HF_TOKEN=SECRET, WANDB_API_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stderr + done.stdout
    return folder


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_the_folder_that_the_design_describes(finished: Path) -> None:
    names = {path.name for path in (finished / "run").iterdir()}
    wanted = {"recipe.yaml", "llmtune.lock", "run.json", "data", "adapter", "checkpoints", "evaluation"}
    assert wanted | {"metrics.jsonl", "report.html", "report.md", "report.json", "junit.xml"} <= names
    report = json.loads((finished / "run" / "report.json").read_text())
    assert {"recipe", "task", "steps", "data", "model", "adapter", "train", "evaluation", "gates"} <= report.keys()
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    assert set(report["evaluation"]["difference"]) == {"loss", "accuracy", "exact_match", "answers_cut"}
    assert {"value", "interval", "p", "n", "test"} == report["evaluation"]["difference"]["loss"].keys()
    assert sum(report["data"]["kept"].values()) + sum(report["data"]["dropped"].values()) == report["data"]["rows_in"]


def test_the_same_recipe_twice_gives_equal_bytes(finished: Path) -> None:
    done = llmtune("train", "tiny.yaml", "--out", "twin", cwd=finished)
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(finished / "twin") == adapter_bytes(finished / "run")


PLAIN_PEFT = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained("run/adapter", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained("run/adapter")
messages = [{"role": "user", "content": "What comes after 5?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0, -1]
assert "llmtune" not in sys.modules
print(json.dumps({"ids": ids, "logits": logits.tolist()}))
"""


def test_plain_peft_loads_the_adapter_and_gives_the_same_logits(finished: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN_PEFT], cwd=finished, capture_output=True, text=True, check=True)
    plain = json.loads(done.stdout)
    context, place = open_finished(finished / "run", Console(quiet=True), offline=True)
    processor = load_processor(place, context.recipe.model)
    ids = context.task.prompt_ids(
        {"messages": [{"role": "user", "content": "What comes after 5?"}]}, processor, context.recipe
    )
    assert ids == plain["ids"]
    with Models(context, place, processor).tuned() as model, torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(plain["logits"]), atol=1e-5, rtol=1e-5)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_no_file_of_a_run_holds_a_secret_of_the_environment(finished: Path) -> None:
    files = [path for path in (finished / "run").rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_generate_and_chat_answer_as_in_the_evaluation(finished: Path) -> None:
    lines = (finished / "run/evaluation/predictions.jsonl").read_text().splitlines()
    row = next(line for line in map(json.loads, lines) if line["tuned"].strip())
    prompt = row["prompt"].removeprefix("user: ")
    done = llmtune("generate", "run", "--prompt", prompt, "--json", cwd=finished)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"].strip() == row["tuned"].strip()
    talk = llmtune("chat", "run", cwd=finished, stdin=f"{prompt}\n/reset\n{prompt}\n/quit\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.split() == row["tuned"].split() * 2


def test_a_run_with_sockets_blocked_goes_through(tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    write_recipe(tmp_path / "tiny.yaml", tiny_llama, rows, train={"max_steps": 2, "num_train_epochs": None})
    code = """
import socket, sys
def refuse(*arguments, **options):
    raise OSError("sockets are blocked")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
sys.argv = ["llmtune", "run", "tiny.yaml", "--out", "run"]
from llmtune.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
