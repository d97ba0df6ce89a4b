"""Merging in memory: the same logits as with the separate adapter, on the requested base."""

import pytest
import torch
from support.adapting import logits, open_model, recipe_with, train_a_little
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.saving import load_adapter, save_adapter
from llmtune.errors import EnvironmentProblem, RecipeError

METHODS = [
    {},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"bias": "all"},
    {"model": {"add_tokens": ["<tool>"]}},
    {"method": "full"},
    {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
]


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_model_is_plain_and_gives_the_same_logits(tiny_llama, tiny_gpt2, tmp_path, family, options):
    if family == "llama" and "bias" in options:
        pytest.skip("it has no biases")
    folder = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]
    renamed = {"embed_tokens": "wte", "q_proj": "c_attn"} if family == "gpt2" else {}
    named = {key: [renamed.get(name, name) for name in names] for key, names in options.items() if type(names) is list}
    adapted = train_a_little(folder, **{**options, **named})
    wanted = logits(adapted.model)
    merged = merge_adapter(adapted)
    assert isinstance(merged, PreTrainedModel)
    torch.testing.assert_close(logits(merged), wanted, atol=2e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain), wanted, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'.*invalid shape")  # PEFT's
def test_refusals_of_peft_to_merge_are_quoted(tiny_llama):
    with pytest.raises(RecipeError, match=r"PEFT cannot merge this adapter: .*the base layer has no bias"):
        merge_adapter(train_a_little(tiny_llama, lora_bias=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantised_model_merges_into_the_requested_weights(tiny_llama, tiny_gpt2, tmp_path, family):
    folder = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]
    recipe = recipe_with(folder, adapter={"method": "qlora"})
    save_adapter(train_a_little(folder, method="qlora"), tmp_path)

    def load():
        return load_adapter(open_model(recipe, training=False), tmp_path)

    on_four_bits = logits(load().model)
    dequantized = merge_adapter(load(), "dequantized")
    torch.testing.assert_close(logits(dequantized), on_four_bits, atol=2e-5, rtol=0)
    beside_original = logits(load_adapter(open_model(recipe_with(folder), False), tmp_path).model)
    original = merge_adapter(load(), "original")
    torch.testing.assert_close(logits(original), beside_original, atol=2e-5, rtol=0)
    assert (on_four_bits - beside_original).abs().max() > 1e-3
    for merged in (dequantized, original):
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(logits(plain), logits(merged), atol=1e-5, rtol=0)


def test_a_merge_into_the_original_keeps_added_tokens(tiny_llama, tmp_path):
    options = {"method": "qlora", "model": {"add_tokens": ["<tool>"]}}
    save_adapter(train_a_little(tiny_llama, **options), tmp_path)
    recipe = recipe_with(tiny_llama, adapter={"method": "qlora"}, model={"add_tokens": ["<tool>"]})
    for onto in ("original", "dequantized"):
        adapted = load_adapter(open_model(recipe, training=False), tmp_path)
        wanted = adapted.model(input_ids=torch.tensor([[425, 7]])).logits[0, 0].detach()
        merged = merge_adapter(adapted, onto)
        row = merged.get_input_embeddings().weight[425]
        assert merged.get_input_embeddings().weight.shape[0] == 426
        assert not torch.allclose(row, merged.get_input_embeddings().weight[:425].mean(0), atol=1e-3)
        got = merged(input_ids=torch.tensor([[425, 7]])).logits[0, 0].detach()
        torch.testing.assert_close(got, wanted, atol=0.2 if onto == "original" else 2e-5, rtol=0)


def test_a_merge_that_is_not_finite_is_reported(tiny_llama):
    adapted = train_a_little(tiny_llama)
    with torch.no_grad():
        next(p for name, p in adapted.model.named_parameters() if "lora_B" in name)[0, 0] = torch.nan
    with pytest.raises(EnvironmentProblem, match="not finite"):
        merge_adapter(adapted)
