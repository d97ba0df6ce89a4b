"""Reinforcement that is interrupted, repeated with other rewards, or in vain."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.process import run_in_child
from support.runs import invoke, write_recipe, write_sums
from support.training import trained_bytes

from llmtune.store.atomic_files import hash_file, read_json_lines
from llmtune.store.run_folder import read_run
from llmtune.tasks.rollouts import Rollouts

REWARD = """
def vowels(row, answer):
    return sum(letter in "aeiou" for letter in answer.lower()) / max(1, len(answer))


def brief(row, answer):
    return 1 / (1 + len(answer))
"""
ODD = """

def odd(row, answer):
    return vowels(row, answer) * (int(row["messages"][-1]["content"]) % 2)
"""
CHRF = {"rewards": {"chrf": 1.0}, "samples": 4, "max_new_tokens": 4, "mask_truncated": False}
MOMENTS = [
    "in the step",
    *(
        pytest.param(moment, marks=pytest.mark.slow)
        for moment in ("before sampling", "while sampling", "after the file of the round", "after a checkpoint")
    ),
]


def write(folder: Path, model: Path, reinforce: dict[str, Any], **train: Any) -> Path:
    """Write a recipe of six steps with a checkpoint after every second one."""
    write_sums(folder / "rows.jsonl")
    train = {"max_steps": 6, "num_train_epochs": None, "batch_size": 2, "save_steps": 2, "save_total_limit": 5} | train
    sections = {"data": {"validation": 0, "test": 0}, "train": train, "evaluate": {"metrics": None}}
    path = folder / "tiny.yaml"
    return write_recipe(path, model, folder / "rows.jsonl", task="reinforce", reinforce=reinforce, **sections)


def train(recipe: Path, run: Path, *changes: str) -> Any:
    settings = [word for change in changes for word in ("--set", change)]
    return invoke("train", recipe, "--out", run, *settings)


def rollouts(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(recipe: str, run: str, moment: str) -> None:
    """Train, and kill this process in step 4: at the end of it for `after a checkpoint`."""
    from llmtune.cli.app import app
    from llmtune.evaluate.sampled_decoding import TokenSampler
    from llmtune.tasks import rollouts as objective
    from llmtune.train import resume

    reached = Path(run) / "rollouts"
    torch.set_num_threads(1)

    def die(owner: Any, name: str, file: str, *, after: bool = False, call: int = 1) -> None:
        original, calls = getattr(owner, name), []

        def wrapped(*values: Any, **named: Any) -> Any:
            calls.extend([1] if (reached / file).is_file() else [])
            if not after and len(calls) == call:
                kill()
            result = original(*values, **named)
            if after and (reached / file).is_file():
                kill()
            return result

        setattr(owner, name, wrapped)

    if moment == "before sampling":
        die(objective.Rollouts, "_sample", "3.jsonl")
    elif moment == "while sampling":
        die(TokenSampler, "pick", "3.jsonl", call=3)
    elif moment == "after the file of the round":
        die(objective, "write_rollouts", "4.jsonl", after=True)
    elif moment == "in the step":
        die(objective.Rollouts, "_policy_loss", "4.jsonl")
    else:
        die(resume, "write_checkpoint", "4.jsonl", after=True)
    app(["train", recipe, "--out", run])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with a recipe and its training without a break."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "rewards.py").write_text(REWARD)
    section = CHRF | {"rewards": {f"{folder / 'rewards.py'}:vowels": 1.0}, "max_new_tokens": 6}
    done = train(write(folder, tiny_llama, section), folder / "run")
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_training_killed_at_any_moment_ends_with_the_same_bytes(moment, whole, tmp_path, monkeypatch):
    run, recipe = tmp_path / "killed", whole / "tiny.yaml"
    died = run_in_child(train_and_die, run, str(recipe), str(run), moment)
    assert died.returncode == -signal.SIGKILL, died.stderr
    resumes_at = 4 if moment == "after a checkpoint" else 2
    assert [*rollouts(run)] != []
    written = len(rollouts(run))
    sampled = []
    original = Rollouts._sample

    def sample(self, step, number, *rest):
        sampled.append(number)
        return original(self, step, number, *rest)

    monkeypatch.setattr(Rollouts, "_sample", sample)
    done = train(recipe, run)
    assert done.exit_code == 0, done.stderr
    assert read_run(run).facts("train")["resumed_from"] == resumes_at
    assert sampled == [*range(written + 1, 7)], "rounds with a file are not sampled again"
    assert rollouts(run) == rollouts(whole / "run")
    assert trained_bytes(run) == trained_bytes(whole / "run")


def test_changed_reward_files_train_again_from_the_beginning(tmp_path, tiny_llama):
    file = tmp_path / "rewards.py"
    file.write_text(REWARD)
    section = CHRF | {"rewards": {f"{file}:vowels": 1.0}, "audit": f"{file}:brief"}
    recipe, run = write(tmp_path, tiny_llama, section, max_steps=2, save_steps=1), tmp_path / "run"
    assert train(recipe, run).exit_code == 0
    first, inputs = rollouts(run), read_run(run).manifest["steps"]["train"]["inputs"]
    assert json.loads((run / "llmtune.lock").read_text())["rewards"] == {str(file): hash_file(file)}
    file.write_text(REWARD.replace("aeiou", "aeiouy "))
    done = train(recipe, run)
    assert done.exit_code == 0, done.stderr
    assert read_run(run).manifest["steps"]["train"]["inputs"] != inputs
    assert read_run(run).facts("train")["resumed_from"] is None
    assert json.loads((run / "llmtune.lock").read_text())["rewards"] == {str(file): hash_file(file)}
    assert {name: data for name, data in rollouts(run).items() if first[name] == data} == {}


def test_a_step_without_spread_updates_no_weight_and_is_counted(tmp_path, tiny_llama):
    file = tmp_path / "rewards.py"
    file.write_text(REWARD + ODD)
    section = CHRF | {"rewards": {f"{file}:odd": 1.0}}
    recipe = write(tmp_path, tiny_llama, section, batch_size=1, max_steps=8, save_steps=1, save_total_limit=9)
    run = tmp_path / "run"
    done = invoke("run", recipe, "--out", run)
    assert done.exit_code == 0, done.stderr
    updates, before = 0, None
    for line in read_json_lines(run / "metrics.jsonl"):
        _, *answers = read_json_lines(run / f"rollouts/{line['step']}.jsonl")
        spread = len({one["reward"] for one in answers}) > 1
        updates += spread
        assert (line["figures"]["spread"], line["figures"]["skipped"]) == (spread, not spread)
        checkpoint = run / f"checkpoints/step-{line['step']}"
        weights = (checkpoint / "trainable.safetensors").read_bytes()
        assert before is None or (weights != before) == spread
        before = weights
        optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]
        assert {int(one["step"]) for one in optimizer["state"].values()} == ({updates} if updates else set())
        assert f"step {line['step']}/8" in done.stderr
    assert 0 < updates < 8
    assert read_run(run).facts("train")["skipped_steps"] == 8 - updates
    for report in ("report.md", "report.html"):
        assert "steps without an update" in (run / report).read_text()


@pytest.mark.parametrize("steps", [3, 12])
def test_a_training_without_spread_ends_with_exit_code_5_and_the_reason(tmp_path, tiny_llama, steps):
    recipe = write(tmp_path, tiny_llama, CHRF | {"rewards": {"exact_match": 1.0}}, max_steps=steps)
    done = train(recipe, tmp_path / "run")
    text = " ".join(done.stderr.split())
    assert done.exit_code == 5, text
    count = min(10, steps)
    assert f"no update in {count} steps, up to step {count}: all rewards equal 0" in text
    assert "llmtune reward check" in text
    assert not (tmp_path / "run/adapter").exists()


def test_a_round_of_the_filter_without_an_accepted_answer_ends_with_exit_code_5(tmp_path, tiny_llama):
    section = {"method": "filter", "rewards": {"chrf": 1.0}, "accept": 1.0, "samples": 2, "max_new_tokens": 4}
    done = train(write(tmp_path, tiny_llama, section), tmp_path / "run")
    text = " ".join(done.stderr.split())
    assert done.exit_code == 5, text
    assert "round 1: no answer is accepted: the best reward is" in text
    assert "reinforce.accept is 1" in text
