"""Make llmtune/model/catalogue.yaml anew from the hub: `python docs/catalogue.py [NAME...]`. It needs the network.

Names are those of the catalogue and those that are given. Sizes, context, licence and languages are taken from the hub;
family and kind stay, or are guessed for a new one. A model that cannot be read keeps its entry; its name is printed.
The shape of an entry with a `source` is from that document; once it is read from the hub, the `source` goes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from llmtune.model.catalogue import CatalogueModel, read_catalogue
from llmtune.model.towers import image_text_class

FILE = Path(__file__).parent.parent / "llmtune" / "model" / "catalogue.yaml"
HEAD = """\
# Models of today, as their config.json on the hub has them. Made anew by `python docs/catalogue.py` on a network.
# `config`: what the memory plan needs, under the configuration's own names; `languages`: those that the card names.
# `source`: where a shape that was not read from the hub is documented. Licences and languages of those models:
# Qwen: github.com/QwenLM/Qwen3.5 and Qwen3-VL; gpt-oss: github.com/openai/gpt-oss; GLM: github.com/zai-org/GLM-4.5;
# Llama 4: github.com/meta-llama/llama-models (models/llama4/MODEL_CARD.md); Gemma: ai.google.dev/gemma/docs/core;
# Ministral 3: huggingface.co/mistralai/Ministral-3-14B-Instruct-2512; EXAONE: github.com/LG-AI-EXAONE; Kimi K2.5:
# github.com/MoonshotAI/Kimi-K2.5; MiniMax: github.com/MiniMax-AI/MiniMax-M2, unsloth/MiniMax-M3-GGUF; DeepSeek:
# github.com/deepseek-ai/DeepSeek-V3.2-Exp; Seed-OSS: github.com/ByteDance-Seed/seed-oss; Granite:
# github.com/ibm-granite/granite-4.0-language-models; LFM: the hub's pages of LiquidAI; Nemotron:
# github.com/NVIDIA-NeMo/Nemotron (skills/nemotron-nano3/model-card.md); Mistral Small 4: llmradar.eu.
"""
TOWERS = ("text_config", "vision_config", "audio_config")
"""Sections of a configuration that have sizes of their own."""
COUNTED = (
    *("tie_word_embeddings", "attention_bias", "attention_k_eq_v", "use_qk_norm", "use_double_wide_mlp"),
    *("enable_moe_block", "block_auto_adjust_ff_dim", "projector_bias", "projector_use_layernorm", "vision_use_head"),
)
"""Switches that change the number of weights."""
SHAPES = (
    *("hybrid_override_pattern", "moe_layer_freq", "feed_forward_proj", "subsampling_conv_channels"),
    "sparse_attention_config",
)
"""Values other than numbers that change the shape."""
LEFT_OUT = re.compile(
    r"(_id|_ids|_index|_theta|^max_position_embeddings|^max_target_positions|^n_positions|^chunk_size_feed_forward"
    r"|mtp_num_hidden_layers|num_nextn_predict_layers|num_mtp_modules)$"
)
"""Numbers that change no shape: ids of tokens, lengths, layers that transformers does not build."""
CLASSES = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModel,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
}
CONTEXTS = ("max_position_embeddings", "n_positions", "max_target_positions")


def main() -> int:
    """Write the catalogue; returns the exit code."""
    known = read_catalogue()
    lines, failed = [HEAD], []
    for name in dict.fromkeys([*known, *sys.argv[1:]]):
        try:
            lines.append(f"{name}: {flow(read_model(name, known.get(name)))}\n")
        except (HfHubHTTPError, OSError, ValueError) as error:
            failed.append(f"{name}: {error}")
            if name in known:
                lines.append(f"{name}: {flow(as_entry(known[name]))}\n")
    FILE.write_text("".join(lines), encoding="utf-8")
    print("\n".join(failed) or "all were read", file=sys.stderr)
    return bool(failed)


def read_model(name: str, known: CatalogueModel | None) -> dict[str, Any]:
    """Return the entry of a model as the hub has it now."""
    card = HfApi().model_info(name).card_data
    config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    licence = card.get("license_name") if card.get("license") == "other" else card.get("license")
    languages = card.get("language") or (known.languages if known else ["en"])
    text = config.get("text_config", config)
    context = next((text[key] for key in CONTEXTS if text.get(key)), known.context if known else 512)
    kind = known.kind if known else guess_kind(config)
    return {
        "family": known.family if known else name.rpartition("/")[2].split("-")[0],
        "kind": kind,
        "licence": licence or (known.licence if known else "other"),
        "languages": [languages] if isinstance(languages, str) else list(languages),
        "context": context,
        **describe_shape(kind, config),
    }


def describe_shape(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return parameters, model type and sizes of a model with this config.json; an encoder's without a head."""
    sizes = pick_sizes(config)
    loaded = AutoConfig.for_model(config["model_type"], **sizes)
    text = config.get("text_config", config)
    if text.get("layer_types") != getattr(loaded.get_text_config(), "layer_types", None) and "layer_types" in text:
        sizes.get("text_config", sizes)["layer_types"] = text["layer_types"]  # not those that the class derives
        loaded = AutoConfig.for_model(config["model_type"], **sizes)
    image_text = image_text_class(loaded) if kind == "decoder" else None
    with torch.device("meta"):
        built = image_text._from_config(loaded) if image_text else CLASSES[kind].from_config(loaded)
    named = {"architectures": [image_text.__name__]} if image_text else {}
    return {
        "parameters": sum(parameter.numel() for parameter in built.parameters()),
        "model_type": config["model_type"],
        "config": {**named, **sizes},
    }


def pick_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that sets the shape, with that of its towers."""
    sizes: dict[str, Any] = {}
    for key, value in config.items():
        if key in TOWERS and isinstance(value, dict):
            named = {"model_type": value["model_type"]} if "model_type" in value else {}
            sizes[key] = {**named, **pick_sizes(value)}
        elif value is not None and (key in (*SHAPES, *COUNTED) or (type(value) is int and not LEFT_OUT.search(key))):
            sizes[key] = value
    return sizes


def guess_kind(config: dict[str, Any]) -> str:
    """Return the kind of a model by its configuration."""
    if config["model_type"] == "whisper":
        return "speech"
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    named = " ".join(config.get("architectures") or ())
    return "encoder" if "MaskedLM" in named else "decoder"


def as_entry(model: CatalogueModel) -> dict[str, Any]:
    """Return the entry of a model as the catalogue has it."""
    names = ("family", "kind", "licence", "languages", "context", "parameters", "model_type", "config", "source")
    return {name: getattr(model, name) for name in names if getattr(model, name) is not None}


def flow(value: Any) -> str:
    """Write a value on one line of YAML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    return json.dumps(value) if isinstance(value, bool) or value in ("no", "on") else str(value)


if __name__ == "__main__":
    sys.exit(main())
