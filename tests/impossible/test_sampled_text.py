"""Rewards: what could differ between an answer as it was sampled and the answer that a reward sees."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from support.models import build_llama
from support.templates import ALWAYS_THINKS
from transformers import AutoTokenizer

from llmtune.store.atomic_files import read_json_lines

SEEN = """
import zlib

def seen(row, answer, content, thoughts, truncated):
    assert answer.strip() == (thoughts or content).strip(), (answer, content, thoughts)
    return zlib.crc32(answer.encode()) % 1000 + 0.5 * truncated
"""


def expected(text: str, truncated: bool) -> float:
    return zlib.crc32(text.encode()) % 1000 + 0.5 * truncated


@pytest.mark.guarantee(
    28,
    cannot="a reward that scores another text than the one that was sampled",
    kept="One record of a sampled answer reaches every reward in training, evaluation and `reward check`: its text "
    "with thoughts, marks and white space, and its calls apart. A truncated thought is visible.",
    shows='"truncated": true, "rewards": {"seen": ...',
    also=["evaluate/test_rewards.py", "data/test_answer_parser.py", "tasks/test_policy_losses.py"],
)
def test_every_reward_sees_the_text_that_was_sampled(
    run: Callable[..., str], shows: Callable[[object], None], place: Path
) -> None:
    build_llama(place / "model", ALWAYS_THINKS)
    (place / "rewards.py").write_text(SEEN)
    reinforce = {"rewards": {"rewards.py:seen": 1.0}, "samples": 2, "max_new_tokens": 6, "control": False}
    sections = {"task": "reinforce", "reinforce": {**reinforce, "mask_truncated": False, "accept": 500}}
    train = {"max_steps": 1, "num_train_epochs": None, "batch_size": 2}
    evaluate = {"metrics": ["reward"], "limit": 3}
    run("run", **sections, train=train, evaluate=evaluate, generation={"max_new_tokens": 6})

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    _, *rollouts = read_json_lines(place / "run/rollouts/1.jsonl")
    for one in rollouts:
        sampled = tokenizer.decode(one["ids"], skip_special_tokens=True)
        assert (one["answer"], one["reward"]) == (sampled, expected(sampled, one["truncated"]))
    truncated = next(one for one in rollouts if one["truncated"] and one["answer"].strip())
    shows(json.dumps(truncated))
    lines = [line for line in read_json_lines(place / "run/evaluation/predictions.jsonl") if "tuned" in line]
    assert len(lines) == 3
    for line, name in product(lines, ("base", "tuned")):
        rated, (greedy,) = line[f"{name}_prediction"], line[f"{name}_parts"]
        assert rated["greedy"]["text"] == greedy["sampled"] != line[name], "samples and rewards have the thoughts"
        assert rated["greedy"]["reward"] == expected(greedy["sampled"], not greedy["complete"])
        assert all(one["reward"] == expected(one["text"], one["cut"]) for one in rated["samples"])
