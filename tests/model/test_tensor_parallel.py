"""A decoder split over processes by transformers' plan answers as in one; models that cannot be split are named."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, VeraConfig, get_peft_model
from support.training import launch_work
from transformers import BitsAndBytesConfig

from llmtune.launch.topology import Topology
from llmtune.model.tensor_parallel import why_unsplit

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
LORA = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
PROJECTIONS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def build(kind, sizes):
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    return made(made.config_class(**sizes)).eval()


def test_decoders_split_over_two_processes_answer_as_in_one_with_little_more_than_half_of_the_weights(
    tmp_path, console, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    models = {
        "dense": build("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}),
        "grouped": build("Qwen3ForCausalLM", GROUPED),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        get_peft_model(model, LoraConfig(**LORA, target_modules=PROJECTIONS)).save_pretrained(
            tmp_path / name / "adapter"
        )
    found = launch_work("split_models", [tmp_path], Topology(2, "fsdp"), console, 2)
    assert found.pop("wrong plan")[0], "a plan that changes the logits is not used"
    assert {name: same for name, (same, _) in found.items()} == dict.fromkeys(
        [f"{name}, {part}" for name in models for part in ("base", "adapter")], True
    )
    assert all(share < 0.6 for _, share in found.values()), found


@pytest.fixture
def two_processes(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("LlamaForCausalLM", SIZES, None),
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4}, "no tensor-parallel plan for GPT2LMHeadModel"),
        ("T5ForConditionalGeneration", {"d_model": 32, "num_layers": 1}, "is not a decoder"),
        ("LlamaForSequenceClassification", SIZES, "is not a decoder"),
        ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 1}, "num_key_value_heads (1) is not a multiple of 2"),
    ],
)
def test_models_that_cannot_be_split_are_named(kind, sizes, reason, two_processes):
    found = why_unsplit(build(kind, sizes))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(**LORA), None),
        (LoraConfig(**LORA, target_modules="all-linear", use_rslora=True, modules_to_save=["lm_head"]), None),
        (LoraConfig(**LORA, use_dora=True), "PEFT does not split DoRA"),
        (VeraConfig(target_modules=["q_proj"]), "PEFT does not split vera"),
    ],
)
def test_adapters_that_cannot_be_split_are_named(config, reason, two_processes):
    found = why_unsplit(get_peft_model(build("LlamaForCausalLM", SIZES), config))
    assert found is None if reason is None else reason in found


def test_quantised_and_offloaded_weights_are_not_split(two_processes, monkeypatch):
    model = build("LlamaForCausalLM", SIZES)
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert why_unsplit(model) == "its weights are quantised"
    del model.config.quantization_config
    monkeypatch.setenv("LLMTUNE_STRATEGY", "fsdp")
    monkeypatch.setenv("LLMTUNE_FSDP_OFFLOAD_PARAMS", "true")
    assert "main memory" in why_unsplit(model)
