from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.classifying import colour_rows, recipe_for
from support.explaining import expect, explain, open_quietly, quiet
from support.models import build_llama
from support.runs import finish_run

from llmtune.explain.adapter_explainer import AdapterExplainer, arrange
from llmtune.explain.trained_modules import Move, find_trained, read_adapter
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

invoke = partial(explain, "adapter")

QUICK = {"train": {"num_train_epochs": 1}, "evaluate": {"metrics": ["loss"]}}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    adapter = {"method": "full", "r": None, "lora_alpha": None}
    return finish_run(folder, build_llama(folder / "llama"), adapter=adapter, **QUICK)


@pytest.fixture(scope="module")
def class_run(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    sections = {
        "adapter": {"r": 4, "lora_alpha": 8, "bias": "lora_only"},
        "train": {"num_train_epochs": 1, "load_best_model_at_end": False},
    }
    recipe = recipe_for(folder / "classes.yaml", built("bert"), colour_rows(), **sections)
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=folder / "run"), quiet())
    return folder / "run"


def look(run: Path) -> AdapterExplainer:
    explainer = AdapterExplainer(open_quietly(run), quiet())
    explainer.read()
    explainer.run()
    return explainer


def test_moves_equal_those_of_the_adapter_on_disk(chat_run: Path, tmp_path: Path):
    found = look(chat_run)
    weights = load_file(chat_run / "adapter" / "adapter_model.safetensors")
    assert list(found.by("layer")) == ["0", "1"]
    assert list(found.by("column")) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(found.in_layers) == len(found.moves) == 14
    for move in found.moves:
        assert f".{move.layer}." in move.module
        assert move.module.endswith(move.column)
        low = {side: weights[f"base_model.model.{move.module}.lora_{side}.weight"] for side in "AB"}
        expected = float((2.0 * low["B"].double() @ low["A"].double()).norm())  # lora_alpha / r = 8 / 4
        assert (move.change, move.rank) == (pytest.approx(expected, rel=1e-4), 4)


def test_the_terminal_shows_the_largest_changes(chat_run: Path, tmp_path: Path):
    result = invoke(chat_run, "--out", tmp_path)
    expect(result, 0, "adapter.html", "adapter.png", "adapter.svg")
    for word in ("The 14 trained modules", "q_proj", "of 4", "By layer: most in", "Largest changes"):
        assert word in result.stdout, word


def test_a_full_training_is_compared_with_the_base(full_run: Path, tmp_path: Path):
    found = look(full_run)
    tuned = load_file(full_run / "weights" / "model.safetensors")
    base = load_file(full_run.parent.parent / "llama" / "model.safetensors")
    assert {move.module for move in found.moves} == {name.removesuffix(".weight") for name in base}
    for move in found.moves:
        old, new = base[f"{move.module}.weight"].double(), tuned[f"{move.module}.weight"].double()
        assert move.change == pytest.approx(float((new - old).norm()), rel=1e-5)
        assert move.change > 0
        assert (move.effective_rank is None) == (old.ndim == 1)
    assert [move.module for move in found.moves if move.layer is None] == ["model.embed_tokens", "model.norm"]
    assert "input_layernorm" in found.by("column")


def test_a_head_and_biases_are_listed_next_to_the_adapter(class_run: Path, tmp_path: Path):
    found = AdapterExplainer(open_quietly(class_run), quiet())
    found.explain(tmp_path)
    kinds = {kind: [move for move in found.moves if move.kind == kind] for kind in ("LoRA", "bias", "whole")}
    assert len(kinds["LoRA"]) == 12
    assert len(kinds["bias"]) == 12
    assert all(move.module.endswith(".bias") for move in kinds["bias"])
    assert "query.bias" in found.by("column")
    assert [move.module for move in kinds["whole"]][-1] == "classifier"
    assert found.new_head
    assert "from random weights" in (tmp_path / "adapter.html").read_text()


def test_moved_modules_match_the_runs_trained_modules(chat_run: Path, class_run: Path, full_run: Path, tmp_path: Path):
    for run in (chat_run, class_run):
        carriers = find_trained(open_quietly(run))
        report = json.loads((run / "report.json").read_text())
        assert carriers.parameters == report["adapter"]["trainable"]
    lora = read_adapter(chat_run / "adapter")["model.layers.0.mlp.down_proj"]
    assert (lora.kind, lora.rank, lora.parameters) == ("LoRA", 4, 4 * (64 + 128))
    head = read_adapter(class_run / "adapter")["classifier"]
    assert (head.kind, head.parameters) == ("whole", 3 * 64 + 3)
    told = json.loads(explain("model", full_run, "--out", tmp_path, "--no-measure", "--json").stdout)
    assert told["trained"] == {"method": "full", "modules": {}, "parameters": 0}


def test_the_drawing_marks_trained_modules(class_run: Path, tmp_path: Path):
    result = explain("model", class_run, "--out", tmp_path, "--no-measure")
    expect(result, 0)
    drawing = (tmp_path / "model.svg").read_text()
    assert drawing.count("LoRA r 4") == 6
    assert drawing.count("fully trained") >= 1
    assert "LoRA on 12 modules" in result.stdout


def test_encoder_and_decoder_moves_have_separate_rows():
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q", "lm_head"]
    moves = arrange([Move(name, "LoRA", 1.0, 2.0, 9) for name in names])
    placed = [(move.layer, move.column, move.module.split(".")[0]) for move in moves]
    assert placed == [("encoder 0", "q", "encoder"), ("decoder 0", "q", "decoder"), (None, None, "lm_head")]


def test_a_plain_model_has_no_adapter(tiny_llama: Path):
    expect(invoke(tiny_llama), 2, "not a run folder", "runs/<name>-<hash>")
    expect(invoke("builtin:minilm-l6-v2"), 2, "builtin:minilm-l6-v2")


def test_a_run_with_a_missing_model_is_an_environment_error(chat_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(chat_run, run)
    text = (run / "recipe.yaml").read_text()
    gone = text.replace(str(chat_run.parent / "model"), str(tmp_path / "gone"))
    assert gone != text
    (run / "recipe.yaml").write_text(gone)
    lock = (run / "llmtune.lock").read_text()
    (run / "llmtune.lock").write_text(lock.replace(str(chat_run.parent / "model"), str(tmp_path / "gone")))
    for command in ("adapter", "model"):
        expect(explain(command, run), 4, "gone")


def test_missing_tuned_weights_are_named(full_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(full_run, run)
    (run / "weights" / "model.safetensors").unlink()
    expect(invoke(run), 4, "weights are missing")
