"""Build every architecture of the installed transformers small, by shrinking configuration fields by name."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.models import train_tokenizer

VOCABULARY = 425


class Kind(NamedTuple):
    """A kind of model: the task that trains it here, and its model types in transformers."""

    task: str
    auto_class: str
    types: Mapping[str, object]
    sections: dict[str, Any]


_TAGGERS = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
KINDS = {
    "causal": Kind("chat", "AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, {}),
    "encoder": Kind(
        "token-classify",
        "AutoModelForTokenClassification",
        {name: None for name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES if name in _TAGGERS},
        {"token_classify": {"labels": ["PLACE"]}},
    ),
    "encoder-decoder": Kind(
        "summarize", "AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, {}
    ),
    "image-text": Kind(
        "chat", "AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, {}
    ),
}
EXACT = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("decoder_start_token_id", "pad_token_id", "pad_index"), 3),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id", "sep_token_id", "eod_token_id"), 2),
    "bos_token_id": 0,
}
"""As the tokenizer has them."""
SIZES: tuple[tuple[str, float], ...] = (
    (r".*(dropout|drop|jitter).*|.*pdrop", 0.0),
    (r".*(period|interval|layer_step|every_n_layers|_pattern|layers_per_group|layer_group_size)", 2),
    (r".*layer_offset", 1),
    (r"depth", 2),
    (r"(.*_)?(num|n)?_?(hidden_|encoder_|decoder_|input_|output_)?layers?", 2),
    (r".*(mamba|ssm).*heads", 8),
    (r".*(key_value|kv|key)_heads", 2),
    (r".*heads?|.*_head_num", 4),
    (r"index_topk.*|keep_window_size", 64),  # more than a row has, since the choice among keys of equal score is random
    (r"topk_group|n_group", 1),
    (r".*(experts?_per_tok|topk|top_k|moe_k)", 2),
    (r".*num.*shared_experts?|n_shared_experts", 1),
    (r".*experts|zero_expert_num|num_hashes", 4),
    (r".*(head_dim|head_size|d_head|d_kv|kv_channels|dim_head|rotary_dim|query_pre_attn_scalar)", 16),
    (r".*rank", 16),
    (r"base_channels", 32),
    (r".*(intermediate|ffn|feed_forward|d_ff|dff|dim_ff|inner|mlp_size|mid).*", 96),
    (r".*(hidden|embed|embedding|backbone|dim|projection|proj).*size|d_model|n_embd|(.*_)?dim", 64),
    (r".*vocab_size.*|.*hash_byte_group_vocab", VOCABULARY),
    (r".*position.*|n_ctx|max_seq.*|context_length|seq_length|max_length", 256),
    (r".*(window|state|chunk_size|block_size|local_attention|chunk_length|chunk_len).*", 16),
    (r".*(buckets|size_base)", 32),
)
"""Pattern of a field's name -> its largest value."""
LAYER_KINDS = {"layer_types", "mlp_layer_types", "layers_block_type"}


def _three_positions(*section: int, **others: Any) -> dict[str, Any]:
    """Return rotary positions for time, height and width; the sections sum to half a head's rotated dimensions."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*section], **others}}


SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("cosmos3_edge_text", "glm4v_text", "glm_ocr_text", "hy_v4_vl_text", "paddleocr_vl_text"),
            *("qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text"),
            "qwen3_vl_text",
        ),
        _three_positions(2, 3, 3),
    ),
    "glm4v_moe_text": _three_positions(1, 1, 2, partial_rotary_factor=0.5),
    "ernie4_5_vl_moe_text": _three_positions(3, 3, 2),
    "hunyuan_vl_text": {"head_dim": 16, **_three_positions(2, 3, 3)},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "apertus1p5": {"image_token_offset": 300, "audio_token_offset": 364},
    "apertus1p5_vision_tokenizer": {"codebook_size": 64},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 424, "IMGIMGAZ": 400, "IMGIMGBZ": 401}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 424, "<|extra_200|>": 399, "<|visual token 000000|>": 400}},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1, 1, 1, 1],
        "projector_dropout": 0.0,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {
        "patch_sizes": [4, 4],
        "hidden_sizes": [32, 64],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 64,
    },
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 410},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 410},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16), "attn_layers": ["local", "lsh"]},
    "step3p5": {"sliding_window": 16},
    "wavtokenizer_encoder": {"codebook_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
}
"""Values for fields that no pattern covers."""


def shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a configuration with small numbers; non-text tokens move to the end of the vocabulary."""
    values: dict[str, Any] = {}
    others = iter(range(VOCABULARY - 1, 0, -1))
    for field in dataclasses.fields(config_class):
        default = field.default
        if field.name in EXACT:
            values[field.name] = EXACT[field.name]
        if not isinstance(default, int | float) or isinstance(default, bool) or field.name in EXACT:
            continue
        largest = next((size for pattern, size in SIZES if re.fullmatch(pattern, field.name)), None)
        if re.fullmatch(r".*_token_(id|index)", field.name) and largest is None:
            values[field.name] = next(others)
        elif largest is not None and default > largest:
            values[field.name] = type(default)(largest)
    values |= _one_layer_of_each_kind(config_class)
    parts = {name: shrink(type(part)) for name, part in _parts(config_class).items()}
    if "kv_lora_rank" in values:  # latent attention: keys for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= parts | SPECIAL.get(config_class.model_type, {})
    return config_class(**values)


def _one_layer_of_each_kind(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """If layers differ, keep one of each kind that the architecture has by default."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    whole = config_class() if fields & LAYER_KINDS else None
    kinds = {name: [*dict.fromkeys(getattr(whole, name, None) or ())] for name in LAYER_KINDS & fields}
    count = max([len(names) for names in kinds.values()], default=0)
    chosen: dict[str, Any] = {
        name: [names[min(i, len(names) - 1)] for i in range(count)] for name, names in kinds.items() if names
    }
    return chosen | {"num_hidden_layers": count} if count > 1 else {}


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, PreTrainedConfig]:
    if not config_class.sub_configs:
        return {}
    whole = config_class()
    found = {name: getattr(whole, name, None) for name in config_class.sub_configs}
    return {name: part for name, part in found.items() if isinstance(part, PreTrainedConfig)}


def silence(config: PreTrainedConfig) -> None:
    """Switch off dropout in place, also in nested configurations."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            silence(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def build(kind: str, model_type: str, folder: Path) -> None:
    """Save a model with random weights, large enough for attention to matter, and a tokenizer."""
    config = shrink(CONFIG_MAPPING[model_type])
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if kind == "encoder-decoder":
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 3, 3, 2
    if isinstance(decoder := getattr(config, "decoder", None), PreTrainedConfig) and hasattr(decoder, "is_decoder"):
        decoder.is_decoder = decoder.add_cross_attention = True
    silence(config)
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if kind == "encoder" else getattr(transformers, KINDS[kind].auto_class)
    save_weights(auto.from_config(config, dtype=torch.float32), folder)
    train_tokenizer().save_pretrained(folder)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Save a random model after making its weights large enough for attention to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad and parameter.std() < 0.1:
                parameter.mul_(4)
    model.save_pretrained(folder)
