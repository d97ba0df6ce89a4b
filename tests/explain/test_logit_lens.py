from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from llmtune.explain.logit_lens import find_layers, read_lens, run_forward

IDS = torch.tensor([[5, 9, 31, 7, 12, 40]])
PLACES = [2, 5]


def look(model: Any, places: list[int] = PLACES, **inputs: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The lens of one forward pass, and the model's output with all hidden states."""
    model.eval()
    lens = read_lens(run_forward(model, inputs, places))
    assert lens is not None
    with torch.no_grad():
        return torch.stack(list(lens)), model(**inputs, output_hidden_states=True)


def gemma2() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=64, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, **shape)
    return Gemma2ForCausalLM(config)


def albert() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 2}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=64, num_hidden_layers=4, **shape))


BEHIND = {
    "llama": lambda model, hidden: model.lm_head(model.model.norm(hidden)),
    "gpt2": lambda model, hidden: model.lm_head(model.transformer.ln_f(hidden)),
    "t5": lambda model, hidden: model.lm_head(model.decoder.final_layer_norm(hidden) * model.config.d_model**-0.5),
    "bert": lambda model, hidden: model.cls(hidden),
}
"""The modules after the layers by family: norm, scale and head."""
AUTO = {"bert": AutoModelForMaskedLM, "modernbert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
AUTO |= {"bart": AutoModelForSeq2SeqLM, "whisper": AutoModelForSpeechSeq2Seq}
MADE = {"gemma2": gemma2, "albert": albert}
"""Families with a soft cap, or with one shared layer."""


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "modernbert", "bart", "whisper", *MADE])
def test_each_layer_is_read_through_the_models_own_head(built, family):
    model = MADE[family]() if family in MADE else AUTO.get(family, AutoModelForCausalLM).from_pretrained(built(family))
    inputs = {"input_features": torch.randn(1, 80, 200)} if family == "whisper" else {"input_ids": IDS}
    lens, output = look(model, **inputs, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}))
    torch.testing.assert_close(lens[:, -1], output.logits[0, PLACES], rtol=1e-4, atol=1e-4)
    states = output.decoder_hidden_states if model.config.is_encoder_decoder else output.hidden_states
    assert lens.shape[:2] == (2, len(states))
    for layer, hidden in enumerate(states[:-1] if family in BEHIND else ()):  # the last one is returned after the norm
        with torch.no_grad():
            wanted = BEHIND[family](model, hidden)[0, PLACES]
        torch.testing.assert_close(lens[:, layer], wanted, rtol=1e-4, atol=1e-4)


def test_experts_of_a_mixture_are_not_mistaken_for_layers(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))
    assert find_layers(model) == list(model.model.layers)


def test_a_model_whose_replay_differs_from_its_output_has_no_lens(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    # an ending that depends on the length of the text cannot be read a position at a time
    model.model.norm.register_forward_hook(lambda module, args, output: output + output.mean(dim=1, keepdim=True))
    assert read_lens(run_forward(model, {"input_ids": IDS}, PLACES)) is None


def test_the_lens_leaves_no_hooks_in_the_model(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = model.eval()(input_ids=IDS).logits
    assert list(read_lens(run_forward(model, {"input_ids": IDS}, PLACES)) or [])
    assert torch.equal(model(input_ids=IDS).logits, before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
