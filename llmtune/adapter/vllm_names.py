"""Adapters on checkpoints for text and images that vLLM would not apply, by the class that a checkpoint names."""

from __future__ import annotations

from pathlib import Path

from llmtune.model.model_files import read_config_file

VLLM_VERSION = "0.33"
"""The version whose `SupportsLoRA` and `hf_to_vllm_mapper` these lists repeat."""
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
