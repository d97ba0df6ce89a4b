"""Saved adapters load with plain PEFT and give the same logits; damaged ones are reported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapting import build_family, logits, open_model, recipe_with, train_a_little
from support.models import build_llama
from transformers import AutoTokenizer

from llmtune.adapter.saving import load_adapter, save_adapter
from llmtune.errors import EnvironmentProblem

METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 6},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-rslora": {"init_lora_weights": "pissa_niter_2", "use_rslora": True},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa-patterns": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "bias": {"bias": "lora_only"},
    "whole": {},
}


def plain_peft(folder: Path) -> torch.Tensor:
    from peft import AutoPeftModelForCausalLM

    from llmtune.model.library_logging import hushed

    with hushed():
        return logits(AutoPeftModelForCausalLM.from_pretrained(folder).eval())


@pytest.mark.parametrize(
    ("family", "method"),  # GPT-2 with OLoRA is refused by name, see test_injection; Llama has no biases
    [("llama", method) for method in METHODS if method != "bias"]
    + [("gpt2", method) for method in METHODS if method != "olora"],
)
def test_every_method_loads_with_plain_peft_and_gives_the_same_logits(tiny_llama, tiny_gpt2, tmp_path, family, method):
    folder = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]
    options = dict(METHODS[method])
    if method == "whole":
        options["modules_to_save"] = [{"llama": "norm", "gpt2": "ln_f"}[family]]
    if method == "pissa-patterns":
        first, second = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn", "c_fc")}[family]
        options |= {"rank_pattern": {first: 3}, "alpha_pattern": {second: 5}}
    adapted = train_a_little(folder, **options)
    wanted = logits(adapted.model)
    base = open_model(recipe_with(folder), training=False)
    assert (wanted - logits(base.model)).abs().max() > 0.05
    save_adapter(adapted, tmp_path)
    tolerance = 2e-5 if "pissa" in method or method == "olora" else 1e-5
    torch.testing.assert_close(plain_peft(tmp_path), wanted, atol=tolerance, rtol=0)
    torch.testing.assert_close(logits(load_adapter(base, tmp_path).model), wanted, atol=tolerance, rtol=0)


def test_a_qlora_adapter_reloads_on_the_same_quantised_base(tiny_llama, tmp_path):
    adapted = train_a_little(tiny_llama, method="qlora")
    save_adapter(adapted, tmp_path)
    recipe = recipe_with(tiny_llama, adapter={"method": "qlora"})
    again = load_adapter(open_model(recipe, training=False), tmp_path)
    assert again.method == "qlora"
    assert torch.equal(logits(again.model), logits(adapted.model))


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_reload_with_plain_peft(tmp_path, tied):
    folder = build_family(tmp_path / "m", "llama", tie_word_embeddings=tied)
    adapted = train_a_little(folder, model={"add_tokens": ["<tool>", "</tool>"]})
    save_adapter(adapted, tmp_path / "a")
    expected = logits(adapted.model)
    assert expected.shape[1] == 427
    torch.testing.assert_close(plain_peft(tmp_path / "a"), expected, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").tokenize("<tool>") == ["<tool>"]


def test_saving_changes_nothing_names_the_base_and_doubles_the_rank_of_pissa(tiny_llama, tmp_path):
    adapted = train_a_little(tiny_llama, init_lora_weights="pissa")
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    hub = replace(adapted.selected.model_ref, name="owner/model", revision="c" * 40)
    save_adapter(adapted, tmp_path / "a")
    save_adapter(replace(adapted, selected=replace(adapted.selected, model_ref=hub)), tmp_path / "b")
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.model.state_dict().items())
    ours, of_hub = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab")
    assert (ours["base_model_name_or_path"], ours["revision"]) == (str(tiny_llama), None)
    assert (of_hub["base_model_name_or_path"], of_hub["revision"]) == ("owner/model", "c" * 40)
    assert (ours["r"], ours["lora_alpha"], ours["init_lora_weights"], ours["inference_mode"]) == (16, 64, True, True)
    weights = [tmp_path / name / "adapter_model.safetensors" for name in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].stat().st_mode == weights[0].with_name("adapter_config.json").stat().st_mode, "others can read it"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_full_weights_are_a_plain_model_folder_in_their_original_dtype(tmp_path, stored):
    from transformers import AutoModelForCausalLM

    folder = build_llama(tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    adapted = train_a_little(folder, method="full")
    wanted = logits(adapted.model)
    save_adapter(adapted, tmp_path / "weights")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert plain.dtype == getattr(torch, stored)
    assert "lm_head.weight" not in load_file(tmp_path / "weights" / "model.safetensors"), "it is the embedding's"
    assert plain.config.use_cache is True
    assert adapted.model.dtype == torch.float32
    tolerance = 1e-6 if stored == "float32" else 0.05
    torch.testing.assert_close(logits(plain.float().eval()), wanted, atol=tolerance, rtol=0)
    again = load_adapter(open_model(recipe_with(folder, adapter={"method": "full"}), False), tmp_path / "weights")
    torch.testing.assert_close(logits(again.model), wanted, atol=tolerance, rtol=0)
    assert again.method == "full"


def test_weights_that_the_model_was_loaded_from_are_not_read_again(tmp_path):
    adapted = train_a_little(build_llama(tmp_path / "m"), method="full")
    save_adapter(adapted, tmp_path / "weights")
    selected = open_model(recipe_with(tmp_path / "weights", adapter={"method": "full"}), training=False)
    (tmp_path / "weights" / "model.safetensors").unlink()
    again = load_adapter(selected, tmp_path / "weights")
    torch.testing.assert_close(logits(again.model), logits(adapted.model), atol=1e-6, rtol=0)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def test_a_missing_weight_file_of_a_full_model_is_reported(tmp_path):
    folder = build_llama(tmp_path / "m")
    save_adapter(train_a_little(folder, method="full"), tmp_path / "weights")
    path = tmp_path / "weights" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    selected = open_model(recipe_with(folder, adapter={"method": "full"}), False)
    with pytest.raises(EnvironmentProblem, match=r"model\.norm\.weight"):
        load_adapter(selected, tmp_path / "weights")


def load_damaged(folder: Path, adapter: Path) -> str:
    with pytest.raises(EnvironmentProblem) as caught:
        load_adapter(open_model(recipe_with(folder), False), adapter)
    return str(caught.value)


@pytest.fixture
def adapter(tiny_llama, tmp_path) -> Path:
    """An adapter to damage: its weights."""
    save_adapter(train_a_little(tiny_llama), tmp_path)
    return tmp_path / "adapter_model.safetensors"


def test_an_adapter_for_another_model_and_a_folder_without_one_are_refused(tiny_llama, tmp_path):
    other = build_family(tmp_path / "other", "llama", intermediate_size=32)
    save_adapter(train_a_little(other), tmp_path / "a")
    assert "made for another model" in load_damaged(tiny_llama, tmp_path / "a")
    assert "no adapter found" in load_damaged(tiny_llama, tmp_path)
    assert "folder not found" in load_damaged(tiny_llama, tmp_path / "gone")


@pytest.mark.parametrize("content", ["{", '{"peft_type": "IA4"}', '{"r": 8}'])
def test_a_damaged_adapter_config_is_refused(tiny_llama, adapter, content):
    adapter.with_name("adapter_config.json").write_text(content)
    assert "adapter_config.json" in load_damaged(tiny_llama, adapter.parent)


def test_an_adapter_with_settings_of_another_method_is_refused(tiny_llama, adapter):
    adapter.with_name("adapter_config.json").write_text('{"peft_type": "IA3", "task_type": "CAUSAL_LM"}')
    assert "have no counterpart" in load_damaged(tiny_llama, adapter.parent)
