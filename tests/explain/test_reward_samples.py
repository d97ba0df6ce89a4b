"""`llmtune reward check --model`: what the base's own answers show of a reward."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.models import build_llama
from support.runs import invoke
from support.templates import ALWAYS_THINKS

from llmtune.explain.reward_samples import measure_groups


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    pairs = [{"prompt": f"What is {i} + 7?", "completion": str(i + 7)} for i in range(12)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return path


def test_groups_show_pass_rates_spread_and_the_samples_needed() -> None:
    rewards = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0.25, np.nan]])
    found = measure_groups(rewards, 1.0, 0)
    assert found["pass@1"]["value"] == pytest.approx(5 / 16)
    assert found["pass@4"]["value"] == 0.5
    assert found["spread"]["value"] == 0.5, "the last group has spread without a passing answer"
    assert found["spread"]["low"] < 0.5 < found["spread"]["high"]
    assert found["samples_needed"] is None, "one of four prompts has a pass rate between 0 and 1"
    assert measure_groups(np.array([[1, 0, 0, 0], [1, 1, 0, 0]]), 1.0, 0)["samples_needed"] == 4
    assert measure_groups(np.array([[1.0, 0.0]]), 1.0, 0)["samples_needed"] == 2


def test_a_reward_that_never_differs_on_the_answers_of_a_model_fails(sums: Path, tiny_llama: Path) -> None:
    options = ("--model", tiny_llama, "--samples", 2, "--max-new-tokens", 4)
    result = invoke("reward", "check", "exact_match", "--rows", sums, *options)
    assert result.exit_code == 6, result.output
    assert "exact_match has no spread: all 2 answers of" in " ".join(result.output.split())


def test_a_reward_with_spread_passes_and_sampling_is_repeatable(sums: Path, tiny_llama: Path) -> None:
    (sums.parent / "rewards.py").write_text("""
def closeness(row, answer):
    gold = row["messages"][-1]["content"]
    return 10.0 if answer == gold else float(sum(map(ord, answer)) % 7) / 7 if answer else 0.0
""")
    name = f"{sums.parent / 'rewards.py'}:closeness"
    options = ("--model", tiny_llama, "--samples", 4, "--max-new-tokens", 8, "--json")
    first, again = (json.loads(invoke("reward", "check", name, "--rows", sums, *options).stdout) for _ in range(2))
    assert first["ok"]
    assert first["model"] == again["model"]
    assert first["model"]["spread"]["value"] > 0.5
    assert (first["model"]["samples"], first["model"]["prompts"]) == (4, 12)
    assert first["recipe"] == {"accept": 10.0, "samples": None}, "no answer passes, so no number of samples suffices"


def test_a_model_that_is_missing_ends_with_exit_4(sums: Path) -> None:
    result = invoke("reward", "check", "exact_match", "--rows", sums, "--model", sums.parent / "absent", "--offline")
    assert result.exit_code == 4, result.output


def test_the_thoughts_of_a_models_answers_reach_a_reward(sums: Path, tmp_path: Path) -> None:
    """The prompt begins the thoughts, and answers of a few tokens do not end them."""
    model = build_llama(tmp_path / "thinker", ALWAYS_THINKS)
    (sums.parent / "rewards.py").write_text("""
def thinks(row, answer, content, thoughts):
    if content:
        return 10.0 * (content == row["messages"][-1]["content"])
    assert answer.strip() == thoughts
    return len(thoughts) / 100
""")
    options = ("--model", model, "--samples", 4, "--max-new-tokens", 4, "--json")
    result = invoke("reward", "check", f"{sums.parent / 'rewards.py'}:thinks", "--rows", sums, *options)
    document = json.loads(result.stdout)
    assert document["ok"], result.output
    assert document["model"]["spread"]["value"] > 0.5
