"""Merge an adapter into its base in memory: into the original weights, or into dequantized 4-bit weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.adapter.load import put_adapter
from llmtune.errors import EnvironmentProblem, RecipeError, first_line
from llmtune.model.device import is_out_of_memory
from llmtune.model.experts import unpacked_experts
from llmtune.model.library_logging import unreported
from llmtune.model.quantized_base import unpack
from llmtune.model.towers import dropped_modules, remove_towers
from llmtune.recipe.peft_options import UNMERGEABLE
from llmtune.records import AdaptedModel, SelectedModel

_SERVE = "Use it with its base, in PEFT or with `llmtune generate` and `llmtune serve`."


def merge_adapter(adapted: AdaptedModel, onto: Literal["original", "dequantized"] = "original") -> PreTrainedModel:
    """Return one plain model; `adapted` is consumed.

    A 4-bit model cannot absorb an adapter. It is merged into the `original` weights, reloaded from their source, or
    into the `dequantized` ones, which the adapter was trained on. A model with quantised files has no original
    weights.

    Raises EnvironmentProblem if a merged weight is not finite, RecipeError for a method that cannot be merged.
    """
    if adapted.method == "full":
        return cast(PreTrainedModel, adapted.model)
    model = cast(PeftModel, adapted.model)
    activated = getattr(model.peft_config["default"], "alora_invocation_tokens", None)
    check_mergeable(adapted.method, ["alora_invocation_tokens"] if activated else [])
    if adapted.selected.base_quantization:
        model = _unpacked(model)
    elif adapted.selected.quantized:
        model = _without_quantization(model, adapted.selected, onto)
    _untie_adapted_embedding(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        if "NaN" not in str(error):
            raise RecipeError.of(f"PEFT cannot merge this adapter: {first_line(error)}", "adapter", _SERVE) from error
        raise EnvironmentProblem.of(
            f"the merged weights of {adapted.selected.model_ref.name} are not finite",
            None,
            "The adapter is damaged: train again.",
        ) from error
    if hasattr(merged.config, "use_cache"):
        merged.config.use_cache = True
    return cast(PreTrainedModel, merged)


def check_mergeable(method: str, options: Iterable[str] = ()) -> None:
    """Raise RecipeError for a method, or an option of LoRA, whose adapters do not change the base's weights."""
    if reason := next((UNMERGEABLE[name] for name in (method, *options) if name in UNMERGEABLE), None):
        raise RecipeError.of(f"an adapter of {method} cannot be merged: {reason}", "adapter.method", _SERVE)


def _untie_adapted_embedding(model: PeftModel) -> None:
    """Give a head that shares an adapted embedding its own copy, in place: the adapter leaves the head unchanged."""
    inner = model.get_base_model()
    if inner.main_input_name == "input_values":  # audio models have no token embedding
        return
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None or not isinstance(embedding, LoraLayer | ModulesToSaveWrapper):
        return
    original = embedding.get_base_layer() if isinstance(embedding, LoraLayer) else embedding.original_module
    if head.weight is original.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        inner.config.get_text_config().tie_word_embeddings = inner.config.tie_word_embeddings = False


def _unpacked(model: PeftModel) -> PeftModel:
    """Remove the adapter, give the base plain weights, and put it back; `model` is consumed."""
    config = replace(model.peft_config["default"])
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    base = cast(PreTrainedModel, model.unload())
    unpack(base)
    model = put_adapter(base, config, trainable=False)
    set_peft_model_state_dict(model, state)
    return model


def _without_quantization(quantized: PeftModel, selected: SelectedModel, onto: str) -> PeftModel:
    """Load the full base, overwrite it with the dequantized weights if requested, and move the adapter over."""
    inner = selected.model
    dtype = inner.config.quantization_config.bnb_4bit_compute_dtype
    with unreported():
        base = type(inner).from_pretrained(
            str(selected.model_ref.path),
            config=_config_of(inner, selected),
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=selected.trains_head,  # the trained head replaces a head for other classes
        )
    if dropped_modules(inner):
        remove_towers(base)
    base.to(inner.device)
    if inner.main_input_name != "input_values":  # audio models have no token embedding
        rows = inner.get_input_embeddings().weight.shape[0]
        if base.get_input_embeddings().weight.shape[0] < rows:  # the recipe added tokens
            base.resize_token_embeddings(rows, mean_resizing=False)
    if onto == "dequantized":
        _copy_dequantized(quantized.get_base_model(), base)
    model = put_adapter(base, replace(quantized.peft_config["default"]), trainable=False)
    set_peft_model_state_dict(model, get_peft_model_state_dict(quantized, save_embedding_layers=False))
    return model


def _config_of(inner: PreTrainedModel, selected: SelectedModel) -> PreTrainedConfig:
    """Reload the model's configuration, with the outputs of our head."""
    config = type(inner.config).from_pretrained(str(selected.model_ref.path), local_files_only=True)
    if selected.trains_head:
        for name in ("id2label", "label2id", "problem_type", "pad_token_id"):
            if hasattr(inner.config, name):
                setattr(config, name, getattr(inner.config, name))
    return config


@torch.no_grad()
def _copy_dequantized(quantized: torch.nn.Module, base: torch.nn.Module) -> None:
    names = {name.replace(".base_layer", ""): module for name, module in quantized.named_modules()}
    for name, module in names.items():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            target = cast(torch.nn.Linear | Conv1D, base.get_submodule(name))
            target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)
    for name, weight in unpacked_experts(quantized).items():
        base.get_parameter(name.replace(".base_layer", "")).copy_(weight)
