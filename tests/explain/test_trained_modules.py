from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from llmtune.explain.trained_modules import adapter_moves, compare_weights, effective_rank
from llmtune.model.library_logging import hushed


def random_adapter(model: PreTrainedModel, **options: Any) -> Any:
    """A PEFT model whose adapter is as after training: B is not zero, and a magnitude is not the norm any more."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, **options}
    with hushed():
        adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return adapted.eval()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone().double() for name, value in model.state_dict().items()}


def merged_weights(adapted: Any) -> dict[str, torch.Tensor]:
    return weights_of(copy.deepcopy(adapted).merge_and_unload())


def assert_as_merged(base: dict[str, torch.Tensor], adapted: Any, count: int) -> None:
    """Every move must be the difference of the weights that PEFT merges, recomputed as a matrix."""
    after = merged_weights(adapted)
    moves = {move.module: move for move in adapter_moves(adapted)}
    moved = {name.rpartition(".")[0] for name in base if not torch.equal(base[name], after[name])}
    assert set(moves) == moved
    assert len(moves) == count
    for name, move in moves.items():
        old, new = base[f"{name}.weight"], after[f"{name}.weight"]
        assert move.change == pytest.approx(float((new - old).norm()), rel=1e-5)
        assert move.weight == pytest.approx(float(old.norm()), rel=1e-6)
        assert move.relative == pytest.approx(move.change / move.weight)
        if move.kind == "LoRA":
            singular = torch.linalg.svdvals((new - old).flatten(1))[: move.rank]
            shares = singular / singular.sum()
            entropy = -float((shares * shares.log()).sum())
            assert move.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
            assert 1 <= move.effective_rank <= move.rank + 1e-6


def test_the_effective_rank_counts_directions_of_equal_strength():
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) is None
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CONVOLUTIONS = [f"wav2vec2.feature_extractor.conv_layers.{number}.conv" for number in range(3)]


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        ("llama", LLAMA, 6),
        ("llama", {**LLAMA, "use_rslora": True}, 6),
        ("llama", {**LLAMA, "rank_pattern": {"q_proj": 2}}, 6),
        ("llama", {**LLAMA, "use_dora": True}, 6),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}, 6),
        ("gpt2", {"target_modules": ["wpe"]}, 1),
        ("wav2vec2", {"target_modules": CONVOLUTIONS}, 3),
    ],
)
def test_moves_equal_those_of_the_merged_weights(built, family, options, count):
    auto = AutoModelForCTC if family == "wav2vec2" else AutoModelForCausalLM
    model = auto.from_pretrained(built(family))
    base = weights_of(model)
    assert_as_merged(base, random_adapter(model, **options), count)


def test_a_fully_trained_head_is_compared_with_its_initial_weights(built):
    model = AutoModelForSequenceClassification.from_pretrained(built("bert"), num_labels=3)
    adapted = random_adapter(model, target_modules=["query"], modules_to_save=["classifier"])
    head = adapted.base_model.model.classifier
    old = torch.cat([part.detach().flatten() for part in head.original_module.parameters()])
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(0.5)
        head.modules_to_save["default"].bias.sub_(0.25)
    moves = {move.module: move for move in adapter_moves(adapted)}
    assert sorted(move.kind for move in moves.values()) == ["LoRA", "LoRA", "whole"]
    move = moves["classifier"]
    assert move.change == pytest.approx((3 * 64 * 0.25 + 3 * 0.0625) ** 0.5, rel=1e-5)
    assert move.weight == pytest.approx(float(old.norm()), rel=1e-5)
    assert (move.rank, move.parameters) == (3, 195)
    assert move.effective_rank == pytest.approx(1, abs=1e-3)  # the same number everywhere: one direction


def test_new_rows_of_an_embedding_are_compared_with_their_initial_values(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = random_adapter(model, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 9]})
    (layer,) = {
        module
        for module in adapted.modules()
        if hasattr(module, "trainable_tokens_delta") and module.tied_adapter is None
    }
    with torch.no_grad():
        layer.trainable_tokens_delta["default"][1].add_(1.0)
    (move,) = [move for move in adapter_moves(adapted) if move.kind == "tokens"]
    assert move.module == "model.embed_tokens"
    assert move.change == pytest.approx(8.0, rel=1e-5)  # 64 ones
    assert move.parameters == 128


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_is_measured_dequantised(tiny_llama: Path):
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=BitsAndBytesConfig(**options))
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for use_dora in (False, True):
        adapted = random_adapter(copy.deepcopy(model), target_modules=["down_proj"], use_dora=use_dora)
        moves = list(adapter_moves(adapted))
        assert len(moves) == 2
        for move in moves:
            exact = float(plain.get_submodule(move.module).weight.norm())
            assert move.weight == pytest.approx(exact, rel=0.1)
            assert move.weight != pytest.approx(exact, rel=1e-4)  # what 4 bits left of it
            assert move.parameters == 128 * 64
            assert move.change > 0


def test_a_matrix_that_did_not_move_has_no_rank():
    weight = {"weight": torch.ones(4, 3)}
    move = compare_weights("head", "weights", weight, {"weight": torch.ones(4, 3)})
    assert (move.change, move.effective_rank, move.rank) == (0.0, None, 3)
    assert (
        compare_weights("head", "weights", {"weight": torch.zeros(2, 2)}, {"weight": torch.ones(2, 2)}).relative is None
    )
