"""Adapters that vLLM would not apply as trained: by their settings, and by the class that their checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig

from llmtune.model.model_files import read_config_file

VLLM_VERSION = "0.33"
"""The version whose `SupportsLoRA` and `hf_to_vllm_mapper` these lists repeat."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512, 1 << 30)
"""Values that vLLM accepts for max_lora_rank, and a huge one that vLLM refuses itself."""
WITHOUT_LORA = frozenset(
    {
        "AriaForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "Cosmos3EdgeForConditionalGeneration",
        "DiffusionGemmaForBlockDiffusion",
        "Gemma3nForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "MiniMaxM3SparseForConditionalGeneration",
        "PaddleOCRVLForConditionalGeneration",
        "Step3p7ForConditionalGeneration",
    }
)
"""vLLM ends after loading these if it gets an adapter."""
UNMAPPED = frozenset(
    {
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VL_MoeForConditionalGeneration",
        "InklingForConditionalGeneration",
        "Molmo2ForConditionalGeneration",
        "UnlimitedOcrForConditionalGeneration",
    }
)
"""The language model has another name in transformers than vLLM expects in an adapter."""


def find_vllm_obstacle(base: Path) -> str | None:
    """Return why vLLM would not apply an adapter on the checkpoint in the folder `base`; None if it would."""
    named = read_config_file(base).get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if name in WITHOUT_LORA:
        return f"vLLM {VLLM_VERSION} has no LoRA for {name}"
    if name in UNMAPPED:
        return f"vLLM {VLLM_VERSION} does not map the names of an adapter on {name}, and would answer as the base model"
    return None


def explain_unapplied(config: PeftConfig) -> str | None:
    """Return why vLLM would not apply an adapter as trained; None if it would.

    vLLM refuses DoRA and fully trained modules only after loading the base. Otherwise it reads `r`, `lora_alpha`,
    `use_rslora` and the matrices of modules (its `PEFTHelper`), and ignores the rest.
    """
    options = vars(config)
    biases = options.get("bias", "none") != "none" or options.get("lora_bias")
    kinds = {
        f"it is of {config.peft_type.lower()}": config.peft_type != "LORA",
        "it adapts experts (target_parameters)": options.get("target_parameters"),
        "it is activated by tokens (alora_invocation_tokens)": options.get("alora_invocation_tokens"),
        "it is a DoRA (use_dora)": options.get("use_dora"),
        "modules are fully trained (modules_to_save)": options.get("modules_to_save"),
        "biases are trained (bias, lora_bias)": biases,
        "tokens are trained (trainable_token_indices)": options.get("trainable_token_indices"),
        "modules have different scales (rank_pattern, alpha_pattern)": config.peft_type == "LORA"
        and len(_scales(options)) > 1,
    }
    kind = next((kind for kind, applies in kinds.items() if applies), None)
    return kind and f"vLLM would not apply this adapter as trained: {kind}"


def _scales(options: Mapping[str, Any]) -> set[float]:
    """Return the scales of a LoRA's modules: PEFT follows the patterns, vLLM has one scale per adapter."""
    ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
    power = 0.5 if options.get("use_rslora") else 1.0
    sizes = [(ranks.get(key, options["r"]), alphas.get(key, options["lora_alpha"])) for key in ("", *ranks, *alphas)]
    return {alpha / rank**power for rank, alpha in sizes}


def largest_rank(*configs: PeftConfig) -> int:
    """Return the smallest `max_lora_rank` of vLLM that fits these LoRAs."""
    rank = max(max(config.r, *(config.rank_pattern or {}).values(), 1) for config in configs)
    return next(limit for limit in RANKS if limit >= rank)
