"""The losses of single training rows, and the suspicious rows that they reveal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import invoke, write_recipe
from support.training import make_recipe, run_training

from llmtune.train import loop

ANSWERS = {"cat": "red", "dog": "green", "bird": "blue", "fish": "black"}
SPOILED = {("cat", 3): "black", ("dog", 11): "blue", ("bird", 20): "red", ("fish", 8): "green", ("cat", 31): "blue"}


def write_rows(path: Path) -> Path:
    rows = [(animal, i, SPOILED.get((animal, i), answer)) for i in range(40) for animal, answer in ANSWERS.items()]
    random.Random(0).shuffle(rows)
    turns = [[{"role": "user", "content": f"{a} {i}"}, {"role": "assistant", "content": said}] for a, i, said in rows]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


def test_rows_with_wrong_answers_are_listed_first_with_their_origin_and_text(tmp_path: Path, tiny_llama: Path) -> None:
    sections: dict[str, Any] = {
        "data": {"validation": 0.0, "test": 0.1, "deduplicate": "none"},
        "adapter": {"method": "full", "r": None, "lora_alpha": None},
        "train": {"learning_rate": 2e-3, "batch_size": 16, "num_train_epochs": 8, "logging_steps": 50},
        "evaluate": {"metrics": ["loss"]},
    }
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, rows, **sections)
    done = invoke("run", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "run" / "report.json").read_text())["train"]["hardest_rows"]
    assert len(found) == 10
    lines = rows.read_text().splitlines()
    spoiled = {f"{animal} {i}" for animal, i in SPOILED}
    trained = {json.loads(line)["messages"][0]["content"] for line in lines} & spoiled
    listed = [row["prompt"] for row in found]
    assert len(spoiled & set(listed[: len(spoiled)])) >= len(trained) - 1, listed
    for row in found:
        file, _, number = row["origin"].rpartition(":")
        assert file == "rows.jsonl"
        messages = json.loads(lines[int(number) - 1])["messages"]
        assert (row["prompt"], row["reference"]) == tuple(message["content"] for message in messages)
        assert row["seen"] == 8
    excess = [row["excess"] for row in found]
    assert excess == sorted(excess, reverse=True)
    assert "rows that were hardest to learn" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("budget", [64, 512])
def test_row_losses_add_up_to_step_losses_for_any_micro_batches(
    budget: int, examples: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: Any
) -> None:
    seen = []
    add = loop.add_step
    monkeypatch.setattr(
        loop, "add_step", lambda table, loss, supervised: (seen.append(loss), add(table, loss, supervised))
    )
    recipe = make_recipe(tmp_path, tiny_llama, train={"num_train_epochs": 1})
    run_training(tmp_path / "run", recipe, examples, budget=budget)
    assert len(seen) == 8
    for loss in seen:
        assert len(loss.row_sums) == len(loss.rows)
        assert loss.row_sums.sum() == pytest.approx(loss.sum, rel=1e-5)
    with np.load(tmp_path / "run" / "row_losses.npz") as saved:
        assert sorted(saved["row"]) == list(range(60))
        assert (saved["seen"] == 1).all()
        assert np.isfinite(saved["loss"]).all()
