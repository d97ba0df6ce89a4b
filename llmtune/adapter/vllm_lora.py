"""Adapters that vLLM would not apply as trained, because of their settings or of their base's class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig

from llmtune.model.model_files import read_config_file

VLLM_VERSION = "0.33"
"""The version whose `SupportsLoRA` and `hf_to_vllm_mapper` the sets below were read from."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512, 1 << 30)
"""Values that vLLM accepts for `max_lora_rank`; it refuses the last one, which represents all larger ranks."""
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
"""Classes that vLLM loads and then exits with an error if it gets an adapter."""
UNMAPPED = frozenset(
    {
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VL_MoeForConditionalGeneration",
        "InklingForConditionalGeneration",
        "Molmo2ForConditionalGeneration",
        "UnlimitedOcrForConditionalGeneration",
    }
)
"""Classes whose language model has another name in transformers than vLLM expects in an adapter."""


def find_vllm_obstacle(base: Path) -> str | None:
    """Return why vLLM would not apply an adapter on the checkpoint in the folder `base`; None if it would."""
    architectures = read_config_file(base).get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name in WITHOUT_LORA:
        return f"vLLM {VLLM_VERSION} has no LoRA for {name}"
    if name in UNMAPPED:
        return f"vLLM {VLLM_VERSION} does not map the names of an adapter on {name}, and would answer as the base model"
    return None


def explain_unapplied(config: PeftConfig) -> str | None:
    """Return why vLLM would not apply an adapter as trained; None if it would.

    vLLM refuses DoRA and fully trained modules only after loading the base. Apart from that it reads `r`, `lora_alpha`,
    `use_rslora` and the matrices of modules (its `PEFTHelper`), and ignores all other settings.
    """
    options = vars(config)
    reasons = {
        f"it is of {config.peft_type.lower()}": config.peft_type != "LORA",
        "it adapts experts (target_parameters)": options.get("target_parameters"),
        "it is activated by tokens (alora_invocation_tokens)": options.get("alora_invocation_tokens"),
        "it is a DoRA (use_dora)": options.get("use_dora"),
        "modules are fully trained (modules_to_save)": options.get("modules_to_save"),
        "biases are trained (bias, lora_bias)": options.get("bias", "none") != "none" or options.get("lora_bias"),
        "tokens are trained (trainable_token_indices)": options.get("trainable_token_indices"),
        "modules have different scales (rank_pattern, alpha_pattern)": config.peft_type == "LORA"
        and len(_scales(options)) > 1,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    return reason and f"vLLM would not apply this adapter as trained: {reason}"


def _scales(options: Mapping[str, Any]) -> set[float]:
    """Return the distinct scales of a LoRA's modules: `alpha / r`, with rsLoRA `alpha / sqrt(r)`.

    PEFT follows the patterns. vLLM has one scale per adapter.
    """
    ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
    power = 0.5 if options.get("use_rslora") else 1.0
    pairs = [(ranks.get(key, options["r"]), alphas.get(key, options["lora_alpha"])) for key in ("", *ranks, *alphas)]
    return {alpha / rank**power for rank, alpha in pairs}


def largest_rank(*configs: PeftConfig) -> int:
    """Return the smallest `max_lora_rank` of vLLM that fits these LoRAs."""
    rank = max(max(config.r, *(config.rank_pattern or {}).values(), 1) for config in configs)
    return next(limit for limit in RANKS if limit >= rank)
