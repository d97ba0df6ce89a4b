"""Processes with different layers of one model run different passes of it."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from support.models import build_llama
from support.training import launch_work

from llmtune.launch.topology import Topology
from llmtune.model.layer_messages import pack_message, unpack_message
from llmtune.model.layer_owners import divide_layers

NAMES = ("divided", "modes", "unequal numbers", "states", "parts", "generated", "decoded", "cache", "after a refusal")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = {
    "bert": ("BertForSequenceClassification", SIZES),
    "gemma3": ("Gemma3ForCausalLM", SIZES | {"head_dim": 8, "sliding_window": 4}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}),
    "lfm2": ("Lfm2ForCausalLM", SIZES | {"layer_types": ["conv", "full_attention"] * 2}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "decoder_start_token_id": 0},
    ),
}
"""An encoder, windows of attention, absolute positions, recurrent layers, and an encoder-decoder."""


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [
        ("placed", 2),
        pytest.param("placed", 4, marks=pytest.mark.slow),
        pytest.param("sharded", 2, marks=pytest.mark.slow),
        pytest.param("sharded", 4, marks=pytest.mark.slow),
    ],
)
def test_processes_with_layers_of_one_model_run_different_numbers_and_kinds_of_passes(
    strategy, processes, tmp_path, console
):
    model = build_llama(tmp_path / "model", layers=8)
    found = launch_work("run_own_passes", [model, strategy], Topology(processes, "fsdp"), console, processes)
    trained = ("same passes", "resharded", "trained between") if strategy == "sharded" else ()
    assert found == dict.fromkeys((*NAMES, *trained, "ended"), True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_models_of_every_kind_generate_with_layers_in_several_processes_as_in_one(processes, tmp_path, console):
    for name, (kind, sizes) in KINDS.items():
        torch.manual_seed(0)
        made = getattr(transformers, kind)
        made(made.config_class(**sizes)).save_pretrained(tmp_path / name)
    found = launch_work("compare_kinds", [tmp_path], Topology(processes, "fsdp"), console, processes)
    assert found == dict.fromkeys(KINDS, True)


def test_layers_are_divided_by_bytes_into_contiguous_ranges():
    layers = [torch.nn.Linear(width, 8, bias=False) for width in (8, 8, 8, 8, 16, 16)]
    assert divide_layers(layers, 2) == [0, 0, 0, 0, 1, 1]
    assert divide_layers(layers, 1) == [0] * 6
    assert divide_layers(layers[:1], 4) == [2]


def test_a_message_has_each_tensor_once_and_keeps_bits_shapes_and_dtypes():
    part = torch.randn(3, 5)
    tensors = [part.bfloat16(), part.t(), torch.tensor(True), torch.empty(0, 4), torch.arange(7, dtype=torch.int16)]
    value = {"tensors": tensors, "same": part, "again": (part, part), "text": "a", "none": None}
    message = pack_message(value)
    assert len(message) < len(pack_message({**value, "again": (part.clone(), part.clone())})) - 2 * part.nbytes + 64
    back = unpack_message(message, torch.device("cpu"))
    for one, other in zip(back.pop("tensors"), tensors, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
    assert torch.equal(back["same"], part)
    assert back["again"][0] is back["again"][1]
    assert (back["text"], back["none"]) == ("a", None)
