"""Reinforcement that is repeated with other rewards, or in vain."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import invoke, write_recipe, write_sums

from llmtune.store.atomic_files import hash_file
from llmtune.store.run_folder import read_run

REWARD = """
def vowels(row, answer):
    return sum(letter in "aeiou" for letter in answer.lower()) / max(1, len(answer))


def brief(row, answer):
    return 1 / (1 + len(answer))
"""
CHRF = {"rewards": {"chrf": 1.0}, "samples": 4, "max_new_tokens": 4, "mask_truncated": False}


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
