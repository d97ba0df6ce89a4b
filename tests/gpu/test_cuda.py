"""bf16 LoRA, QLoRA, recovery from lack of memory, and the shipped recipes, on a CUDA device."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from support.adapting import open_model
from support.exports import export_tuned
from support.models import build_llama
from support.runs import llmtune, write_recipe
from support.training import adapt, make_recipe, run_training, write_examples

from llmtune.adapter.saving import load_adapter, save_adapter
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.tuned_model import TunedModel
from llmtune.records import AdaptedModel
from llmtune.tasks.registry import get_task

SHIPPED = {"chat": "debian-summaries", "chat-qlora": "debian-summaries", "completion": "kjv-psalms"}


@torch.no_grad()
def logits_of(adapted: AdaptedModel) -> torch.Tensor:
    ids_BT = torch.arange(4, 60, device="cuda")[None]
    logits: torch.Tensor = adapted.model(input_ids=ids_BT).logits
    return logits.float()


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_in_bfloat16_learns_and_says_that_it_was_on_the_gpu(
    tiny_llama: Path, chat_rows: Path, tmp_path: Path, method: str
) -> None:
    adapter: dict[str, Any] = {"method": method}
    train: dict[str, Any] = {}
    if method == "full":
        adapter |= {"r": None, "lora_alpha": None}
        train = {"learning_rate": 1e-3}
    write_recipe(
        tmp_path / "tiny.yaml", tiny_llama, chat_rows, model={"dtype": "bfloat16"}, adapter=adapter, train=train
    )
    done = llmtune("run", "tiny.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    assert report["evaluation"]["tuned"]["loss"] < report["evaluation"]["base"]["loss"]
    assert report["train"]["peak_bytes"] > 0
    assert "cuda" in json.dumps(report)


def test_the_same_recipe_twice_gives_the_same_bytes(tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "tiny.yaml", tiny_llama, chat_rows, model={"dtype": "bfloat16"})
    for out in ("one", "two"):
        done = llmtune("train", "tiny.yaml", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / out / "adapter/adapter_model.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_packed_and_padded_training_have_the_same_loss(tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    losses = []
    for packing in (True, False):
        name = f"packing-{packing}"
        write_recipe(tmp_path / f"{name}.yaml", tiny_llama, chat_rows, data={"packing": packing})
        done = llmtune("train", f"{name}.yaml", "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_quantised_base_is_in_4_bits_and_its_adapter_reloads_on_it(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_llama, adapter={"method": "qlora"}, model={"dtype": "bfloat16"})
    examples = write_examples(tmp_path / "examples", train=64, validation=8)
    adapted = adapt(recipe, "cuda")
    quantised = [module for module in adapted.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 14  # seven projections in each of two layers
    assert all(
        module.weight.element_size() * module.weight.numel() <= module.in_features * module.out_features / 2
        for module in quantised
    )
    trained = run_training(tmp_path / "run", recipe, examples, adapted=adapted)
    assert trained.train_loss < trained.first_loss
    wanted = logits_of(adapted)
    save_adapter(adapted, tmp_path / "saved")
    again = load_adapter(open_model(recipe, training=False, device="cuda"), tmp_path / "saved")
    torch.testing.assert_close(logits_of(again), wanted, atol=1e-2, rtol=1e-2)
    tuned = TunedModel(again, recipe, get_task("chat"))
    certificate = export_tuned(tuned, merged_format(onto="dequantized"), tmp_path / "merged")
    assert certificate["passed"]


@pytest.fixture
def little_memory() -> Iterator[int]:
    """Let this process have 256 MiB of the device."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + (256 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_lack_of_memory_shrinks_the_budget_and_changes_no_result(tmp_path: Path, little_memory: int) -> None:
    model = build_llama(tmp_path / "deep", layers=12)
    recipe = make_recipe(
        tmp_path, model, train={"max_steps": 3, "batch_size": 512, "logging_steps": 1}, data={"max_length": 1024}
    )
    examples = write_examples(tmp_path / "examples", longest=100, train=1024, validation=16)
    budgets: list[int] = []
    generous = run_training(
        tmp_path / "generous", recipe, examples, adapted=adapt(recipe, "cuda"), budget=1 << 20, on_budget=budgets.append
    )
    assert budgets, "a micro-batch of all rows fits: the test limits memory too little"
    assert generous.micro_batch_tokens == budgets[-1] < 1 << 20
    small = run_training(tmp_path / "small", recipe, examples, adapted=adapt(recipe, "cuda"), budget=512)
    assert generous.steps == small.steps == 3
    assert generous.train_loss == pytest.approx(small.train_loss, rel=1e-4)
    assert generous.supervised_tokens == small.supervised_tokens


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_of_each_family_runs(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    values = {
        "model.name": tiny_llama,
        "data.train": f"{{path: builtin:{SHIPPED[name]}, limit: 60}}",
        "train.num_train_epochs": 1,
        "train.learning_rate": 0.01,
        "generation.max_new_tokens": 8,
        "evaluate.gates": "[]",
    }
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    done = llmtune("run", name, "--out", "run", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["evaluation"]["tuned"]["loss"] < report["evaluation"]["base"]["loss"]
