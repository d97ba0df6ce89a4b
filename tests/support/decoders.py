"""Small random decoders of several families, and random prompts for them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.model.packed_attention import PACKED, install_packed

SIZE = 90
SHAPE: dict[str, Any] = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWS = {"sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 8}
GEMMA = {**WIDE, **WINDOWS, "head_dim": 8, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,
    "mistral": {**WIDE, "sliding_window": 5},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": WIDE,
    "gpt_neox": {**SHAPE, "intermediate_size": 64},
    "gpt2": {"vocab_size": SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "bloom": {"vocab_size": SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SHAPE,
    "mamba": {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
BEGINNING = [(7 * i + 3) % SIZE for i in range(12)]


def make_decoder(family: str, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if "embed" in name else 5)  # a fresh model repeats itself whatever the prompt
    if attention is not None:
        model.set_attn_implementation(attention)
    if attention == PACKED:
        install_packed(model)
    return model


def prompts_of(lengths: Sequence[int], beginning: Sequence[int] = ()) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [[*beginning, *row] for row in rows]
