"""Files of sampled answers: only what a round of this training can have written is read."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import write_recipe
from transformers import AutoModelForCausalLM

from llmtune.recipe.loader import load_recipe
from llmtune.store.atomic_files import hash_value
from llmtune.tasks.reinforce import Reinforce
from llmtune.tasks.rollouts import Rollout, Rollouts, write_rollouts

HEADER = {"round": 1, "inputs": "abc", "prompts": [4, 7], "answers": 4}
FIRST = Rollout(4, 0, [5, 6, 2], "so", False, {"chrf": 0.25}, 0.25, [-1.5, -0.25, -3.0])
ANSWERS = [replace(FIRST, row=row, sample=sample) for row in (4, 7) for sample in (0, 1)]


@pytest.fixture(scope="module")
def objective(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that reads a file as the objective of a training with three tokens an answer does."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "rows.jsonl").touch()
    section = {"rewards": {"chrf": 1.0}, "samples": 2, "max_new_tokens": 3}
    sections = {"reinforce": section, "evaluate": {"metrics": None}}
    path = write_recipe(folder / "r.yaml", tiny_llama, folder / "rows.jsonl", task="reinforce", **sections)
    recipe = load_recipe(str(path)).recipe
    task = Reinforce()
    training = SimpleNamespace(model=AutoModelForCausalLM.from_pretrained(tiny_llama))
    return lambda path: Rollouts(task.loss, task, recipe)._read_round(path, HEADER, training, keeps_logps=True)


def test_answers_are_read_as_they_were_written(objective: Any, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts" / "1.jsonl", HEADER, ANSWERS)
    assert objective(tmp_path / "rollouts" / "1.jsonl") == ANSWERS


CHANGES: dict[str, dict[str, Any]] = {
    "an id beyond the vocabulary": {"ids": [5, 6, 10**6]},
    "a negative id": {"ids": [5, 6, -1]},
    "an id as text": {"ids": [5, 6, "2"]},
    "a number of a fraction": {"ids": [5, 6, 2.5]},
    "no ids": {"ids": [], "logps": []},
    "more ids than a round samples": {"ids": [5] * 4, "logps": [-1.0] * 4},
    "a million ids": {"ids": [5] * 10**6, "logps": [-1.0] * 10**6},
    "fewer log-probabilities than ids": {"logps": [-1.5]},
    "a log-probability that is no number": {"logps": [-1.5, -0.25, float("nan")]},
    "an infinite log-probability": {"logps": [-1.5, -0.25, -float("inf")]},
    "a log-probability as text": {"logps": [-1.5, -0.25, "x"]},
    "ids that are no list": {"ids": 5},
    "another row": {"row": 5},
    "a sample twice": {"sample": 1},
    "a reward that is no number": {"rewards": {"chrf": float("nan")}, "reward": float("nan")},
    "an infinite reward": {"rewards": {"chrf": float("inf")}, "reward": float("inf")},
    "a reward too large for a mean": {"rewards": {"chrf": 1e308}, "reward": 1e308},
    "a reward as text": {"rewards": {"chrf": "high"}},
    "another reward": {"rewards": {"mine": 0.25}},
    "a sum that is not that of the rewards": {"reward": 0.5},
    "an answer that is no text": {"answer": ["so"]},
    "half a character": {"answer": "\ud800"},
    "truncated as text": {"truncated": "no"},
    "a further key": {"more": 1},
    "a value nested deep": {"answer": json.loads("[" * 900 + "]" * 900)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_answer_with_its_right_hash_is_sampled_again(objective: Any, tmp_path: Path, change: Any) -> None:
    file, lines = tmp_path / "1.jsonl", [asdict(one) for one in ANSWERS]
    lines[0] |= change
    hashed = [line | {"hash": _hash(line)} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in (HEADER, *hashed)))
    assert objective(file) is None


def _hash(line: Any) -> str:
    try:
        return hash_value(line)
    except (UnicodeEncodeError, RecursionError):  # the reader must not fail in this way
        return ""


@pytest.mark.parametrize("text", ["", "{}\n", "[" * 5000 + "\n", json.dumps(HEADER) + "\n" + "null\n" * 4, "{" * 10**7])
def test_a_file_of_something_else_is_not_read(objective: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "1.jsonl").write_text(text)
    assert objective(tmp_path / "1.jsonl") is None


def test_a_file_that_ends_in_zeros_is_not_read(objective: Any, tmp_path: Path) -> None:
    file = tmp_path / "rollouts" / "1.jsonl"
    write_rollouts(file, HEADER, ANSWERS)
    file.write_bytes(file.read_bytes()[:-60] + bytes(60))
    assert objective(file) is None
