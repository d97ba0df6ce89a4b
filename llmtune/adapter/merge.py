"""Adapter and base made one, in memory: onto the original weights, or onto what 4 bits left of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft import get_peft_model as add_adapter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.model.quiet import hushed
from llmtune.records import AdaptedModel, SelectedModel


def merge(adapted: AdaptedModel, onto: Literal["original", "dequantized"] = "original") -> PreTrainedModel:
    """Return one plain model; `adapted` is used up.

    A model in 4 bits cannot take an adapter in: it is merged onto the `original` weights, loaded again from where they
    came, or onto the `dequantized` ones, which are what the adapter was trained on.

    Raises EnvironmentProblem where a merged weight is not finite.
    """
    if adapted.method == "full":
        return cast(PreTrainedModel, adapted.model)
    model = cast(PeftModel, adapted.model)
    if adapted.selected.quantized:
        model = _onto_dequantized(model) if onto == "dequantized" else _onto_original(model, adapted.selected)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT found a NaN
        raise _not_finite(adapted) from error
    merged.config.use_cache = True
    return cast(PreTrainedModel, merged)


def _not_finite(adapted: AdaptedModel) -> LlmtuneError:
    return EnvironmentProblem.of(
        f"the merged weights of {adapted.selected.place.name} are not finite",
        None,
        "The adapter is damaged: train again.",
    )


def _onto_original(quantized: PeftModel, selected: SelectedModel) -> PeftModel:
    """Load the base without quantisation and move the adapter over."""
    dtype = selected.model.config.quantization_config.bnb_4bit_compute_dtype
    base = (
        type(selected.model)
        .from_pretrained(str(selected.place.path), dtype=dtype, local_files_only=True, attn_implementation="sdpa")
        .to(selected.model.device)
    )
    rows = selected.model.get_input_embeddings().weight.shape[0]
    if base.get_input_embeddings().weight.shape[0] < rows:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return _move_adapter(quantized, base)


def _onto_dequantized(quantized: PeftModel) -> PeftModel:
    state = get_peft_model_state_dict(quantized, save_embedding_layers=False)
    config = quantized.peft_config["default"]
    base = quantized.unload()
    return _fill(base.dequantize(), config, state)


def _move_adapter(source: PeftModel, base: PreTrainedModel) -> PeftModel:
    return _fill(base, source.peft_config["default"], get_peft_model_state_dict(source, save_embedding_layers=False))


def _fill(base: PreTrainedModel, config: LoraConfig, state: dict[str, torch.Tensor]) -> PeftModel:
    transposed = [name for name, module in base.named_modules() if isinstance(module, Conv1D)]
    config = replace(config, fan_in_fan_out=bool(transposed))  # 4 bits turn GPT-2's Conv1D into a Linear
    with hushed():
        model = add_adapter(base, config)
    set_peft_model_state_dict(model, state)
    return cast(PeftModel, model)
