"""Weights are loaded as the recipe says, completely, with the same result each time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from support.adapting import build_family, documents, open_model, packed, recipe_with
from support.families import build_bert
from support.models import build_llama, train_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.causal_lm_loss import causal_loss
from llmtune.model.config import head_names

SMALL = {"vocab_size": 425, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL["intermediate_size"] = 32


@pytest.mark.parametrize(
    ("method", "training", "wanted"),
    [("lora", True, torch.bfloat16), ("full", True, torch.float32), ("full", False, torch.bfloat16)],
)
def test_full_fine_tuning_keeps_float32_masters(tiny_llama, method, training, wanted):
    recipe = recipe_with(tiny_llama, model={"dtype": "bfloat16"}, adapter={"method": method})
    selected = open_model(recipe, training)
    assert {parameter.dtype for parameter in selected.model.parameters()} == {wanted}
    assert not selected.quantized


def test_weights_to_be_sharded_keep_the_dtype_of_their_files_unless_some_may_be_new(tiny_llama):
    found = {}
    for name, section in {"same": {}, "more tokens": {"add_tokens": ["<tag>"]}}.items():
        recipe = recipe_with(tiny_llama, model={"dtype": "bfloat16", **section}, adapter={"method": "full"})
        found[name] = {one.dtype for one in open_model(recipe, masters=False).model.parameters()}
    assert found == {"same": {torch.bfloat16}, "more tokens": {torch.float32}}


@pytest.mark.parametrize(
    ("build", "task", "dtype", "training", "wanted"),
    [
        (build_bert, "embed", "auto", True, torch.float32),
        (build_bert, "embed", "auto", False, torch.bfloat16),
        (build_bert, "embed", "bfloat16", True, torch.bfloat16),
        (build_bert, "rerank", "auto", True, torch.float32),
        (build_bert, "rerank", "auto", False, torch.float32),
        (build_bert, "rerank", "bfloat16", False, torch.bfloat16),
        (build_llama, "rerank", "auto", False, torch.bfloat16),
        (build_bert, "classify", "auto", True, torch.bfloat16),
        (build_llama, "embed", "auto", True, torch.bfloat16),
    ],
)
def test_an_encoder_for_search_keeps_its_frozen_weights_in_float32(
    tmp_path, monkeypatch, build, task, dtype, training, wanted
):
    monkeypatch.setattr("llmtune.model.device.has_fast_bfloat16", lambda device: True)
    recipe = recipe_with(build(tmp_path), model={"dtype": dtype}).model_copy(update={"task": task})
    assert {parameter.dtype for parameter in open_model(recipe, training).model.parameters()} == {wanted}


def test_a_loaded_model_is_in_eval_mode_with_a_cache_only_outside_training(tiny_llama):
    for training in (True, False):
        model = open_model(recipe_with(tiny_llama), training).model
        assert not any(module.training for module in model.modules())
        assert model.config.use_cache is not training


@pytest.mark.parametrize("double", [True, False])
def test_qlora_stores_four_bits_per_weight_except_in_the_head(tiny_llama, double):
    recipe = recipe_with(tiny_llama, adapter={"method": "qlora", "bnb_4bit_use_double_quant": double})
    selected = open_model(recipe)
    quantized = [module for module in selected.model.modules() if isinstance(module, Linear4bit)]
    assert selected.quantized
    assert len(quantized) == 14
    assert {(module.weight.quant_type, module.weight.quant_state.nested) for module in quantized} == {("nf4", double)}
    assert all(2 * m.weight.numel() == m.in_features * m.out_features for m in quantized), "two weights a byte"
    assert type(selected.model.lm_head) is torch.nn.Linear
    assert head_names(selected.model) == ["lm_head"]


def test_an_evaluation_in_between_keeps_gradients_of_a_quantised_model_correct(tmp_path):
    """bitsandbytes repacks weights at the first forward pass in eval mode, into a format without a gradient."""
    selected = open_model(recipe_with(build_llama(tmp_path), adapter={"method": "qlora"}))
    model = selected.model
    embedding = model.get_input_embeddings().weight.requires_grad_()
    batch = packed(documents([9, 14]))

    def gradient() -> torch.Tensor:
        embedding.grad = None
        model.train()
        causal_loss(model, batch).sum.backward()
        return embedding.grad.clone()

    before = gradient()
    model.eval()
    with torch.no_grad():
        causal_loss(model, batch)
    assert torch.equal(gradient(), before)


def test_added_tokens_get_the_mean_of_the_other_rows(tiny_llama):
    recipe = recipe_with(tiny_llama, model={"add_tokens": ["<tool>", "</tool>"]})
    model = open_model(recipe).model
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 427
    assert model.config.vocab_size == 427
    torch.testing.assert_close(weight[425], weight[:425].mean(0))
    torch.testing.assert_close(weight[425], weight[426])
    assert model.get_output_embeddings().weight is weight


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_llama, tmp_path):
    folder = build_llama(tmp_path)
    tokenizer = train_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(EnvironmentProblem, match="426 tokens but the model has room for 425"):
        open_model(recipe_with(folder))


def test_a_tokenizer_with_gaps_and_ids_beyond_the_model_is_refused(tiny_llama, tmp_path):
    folder = build_llama(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 900
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(EnvironmentProblem, match="425 tokens, with ids up to 900, but the model has room for 425"):
        open_model(recipe_with(folder))
    vocabulary[last] = 430
    (folder / "tokenizer.json").write_text(json.dumps(content))
    recipe = recipe_with(folder, model={"add_tokens": ["<new>"]})
    assert open_model(recipe).model.get_input_embeddings().weight.shape[0] == 431


@pytest.mark.parametrize(
    ("family", "auto", "extra"),
    [
        ("bert", AutoModelForMaskedLM, {}),
        ("bert", AutoModel, {}),
        ("t5", AutoModelForSeq2SeqLM, {"d_model": 32, "num_heads": 2, "d_ff": 32}),
        ("vit", AutoModel, {}),
    ],
)
def test_a_model_that_cannot_chat_is_refused_by_name(tmp_path, family, auto, extra):
    train_tokenizer().save_pretrained(tmp_path)
    model = auto.from_config(AutoConfig.for_model(family, **{**SMALL, **extra}))
    model.save_pretrained(tmp_path)
    with pytest.raises(RecipeError) as caught:
        open_model(recipe_with(tmp_path))
    assert type(model).__name__ in str(caught.value)
    assert "ForCausalLM" in str(caught.value)


def test_a_bare_decoder_is_accepted_if_its_weights_fit(tmp_path):
    train_tokenizer().save_pretrained(tmp_path)
    config = AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=True)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    assert type(open_model(recipe_with(tmp_path)).model).__name__ == "LlamaForCausalLM"


def test_generation_ends_at_the_tokenizers_end_token(tmp_path):
    folder = build_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    settings = open_model(recipe_with(folder), training=False).model.generation_config
    assert settings.eos_token_id == [0, 2]
    assert settings.pad_token_id == 3


@pytest.mark.parametrize(
    ("family", "auto", "task", "reason"),
    [
        ("bert", AutoModelForCausalLM, {"task": "chat"}, "sees the tokens that it should predict"),
        ("convbert", AutoModelForMaskedLM, {"task": "token-classify"}, "it does not ignore padding"),
        ("esm", AutoModelForMaskedLM, {"task": "token-classify"}, "cannot read text alone"),
    ],
)
def test_a_model_that_misreads_rows_of_text_is_refused_by_name(tmp_path, family, auto, task, reason):
    train_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **({"mask_token_id": None} if family == "esm" else {}))
    model = auto.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=f"which .*{reason}"):
        open_model(recipe_with(tmp_path).model_copy(update=task))


def scaled_positions(kind: str) -> dict[str, object]:
    """RoPE that stretches for rows beyond 64 tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    return {"rope_parameters": rope, "original_max_position_embeddings": 64, "max_position_embeddings": 64}


@pytest.mark.parametrize(("family", "kind"), [("phi3", "longrope"), ("llama", "dynamic")])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_long_enough_to_change_the_positions_of_others_are_refused(tmp_path, family, kind, packing):
    folder = build_family(tmp_path, family, **scaled_positions(kind))
    fits = {"packing": packing, "max_length": 64}
    assert open_model(recipe_with(folder, data=fits)).packs == packing
    with pytest.raises(RecipeError) as caught:
        open_model(recipe_with(folder, data={**fits, "max_length": 200}))
    assert "than 64 tokens, but data.max_length is 200" in str(caught.value)
    assert caught.value.problems[0].fix == "Set data.max_length to 64 or less."


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = {config}
"""


OWN_CONFIG = {"auto_map": {"AutoConfig": "modeling_own.OwnConfig"}, "model_type": "own"}


@pytest.mark.parametrize("own", [OWN_CONFIG, {}], ids=["own configuration", "configuration of transformers"])
def test_a_model_with_its_own_code_loads_if_it_is_trusted(tiny_llama, tmp_path, console, own):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(OWN_CODE.format(config="OwnConfig" if own else "LlamaConfig"))
    config = json.loads((folder / "config.json").read_text())
    names = {**own.get("auto_map", {}), "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {**own, "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = recipe_with(folder, model={"trust_remote_code": True})
    selected = open_model(recipe, console=console)
    assert type(selected.model).__name__ == "OwnForCausalLM"
    assert "its own code" in console.file.getvalue()
    batch = packed(documents([9, 14]))
    with torch.no_grad():
        ours = causal_loss(selected.model, batch).sum
        theirs = causal_loss(open_model(recipe_with(tiny_llama)).model, batch).sum
    torch.testing.assert_close(ours, theirs)


def test_the_head_gets_contiguous_rows_to_avoid_copying_its_weights(tiny_llama: Path) -> None:
    model = open_model(recipe_with(tiny_llama)).model
    seen: list[bool] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].is_contiguous()))
    with torch.inference_mode():
        model(torch.arange(4, 36).reshape(8, 4), logits_to_keep=1)
    assert seen == [True]
