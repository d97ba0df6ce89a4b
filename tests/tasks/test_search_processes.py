"""Several processes learn vectors and rankings as one does: they gather all negatives of a step, with gradients."""

import os
import time
from pathlib import Path

import pytest
import torch
from support.families import build_bert
from support.pairs import learn_a_little, quiet, recipe_of
from support.training import launch_work

from llmtune.errors import LlmtuneError
from llmtune.launch.topology import Topology

pytestmark = pytest.mark.slow
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SECTIONS = {
    "generation": {"max_new_tokens": None},
    "adapter": {"lora_dropout": 0.0},
    "train": {"optim": "sgd", "learning_rate": 0.05, "batch_size": 12},
}
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone", "sky")
TEXTS = [(f"number {i} {THINGS[i % 9]}", f"The {THINGS[i % 9]} number {i} is red. " * (1 + i % 3)) for i in range(60)]
ROWS = {
    "negatives": [
        {"query": query, "passage": text, "negatives": [f"One {THINGS[i % 7]} sits."] * (i % 2)}
        for i, (query, text) in enumerate(TEXTS)
    ],
    "scores": [{"query": query, "passage": text, "score": i % 7 / 6} for i, (query, text) in enumerate(TEXTS)],
    "classes": [{"text": text, "label": THINGS[i % 9]} for i, (_, text) in enumerate(TEXTS)],
    "rerank": [
        {"query": query, "passages": [text, TEXTS[i - 1][1]], "relevances": [1, 0]}
        for i, (query, text) in enumerate(TEXTS)
    ],
}


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one_with_the_same_losses_and_weights(strategy, method, tmp_path):
    """Losses and weights differ by less than 1e-5 in float32."""
    model = build_bert(tmp_path / "model", **STILL)
    alone = {}
    for name, rows in ROWS.items():
        adapter = {"method": "full"} if method == "full" else SECTIONS["adapter"]
        sections = SECTIONS | {"adapter": adapter}
        if name == "negatives":
            sections["embed"] = {"dimensions": [64, 16]}
        path = recipe_of(tmp_path / name, model, rows, "rerank" if name == "rerank" else "embed", **sections)
        alone[name] = learn_a_little(path)
    together = launch_work("learn_all", [tmp_path, strategy], Topology(2, strategy), quiet(), 2)
    for name, steps in alone.items():
        assert [one[0] for one in together[name]] == pytest.approx([one[0] for one in steps], rel=1e-5, abs=1e-6), name
        assert steps[-1][1] > 1e-4, "the weights moved"
        one, two = (torch.load(tmp_path / name / f"weights-{count}.pt") for count in (1, 2))
        worst = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))
        assert worst < 1e-5, name


def test_a_process_without_memory_leaves_no_other_waiting(tmp_path):
    model = build_bert(tmp_path / "model", **STILL)
    recipe_of(tmp_path, model, ROWS["negatives"], "embed", **SECTIONS)
    found = launch_work("run_out_of_memory", [tmp_path, "ddp"], Topology(2, "ddp"), quiet(), 2)
    assert found == ["MicroBatchTooLarge"] * 2
    started = time.monotonic()
    with pytest.raises(LlmtuneError, match="out of memory alone"):
        launch_work("run_out_of_memory", [tmp_path, "fsdp"], Topology(2, "fsdp"), quiet(), 2)
    assert time.monotonic() - started < 120, "the launch ends with the process, not after a timeout"
