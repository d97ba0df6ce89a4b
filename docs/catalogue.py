"""Make llmtune/model/catalogue.yaml anew from the hub: `python docs/catalogue.py [NAME...]`. It needs the network.

Names are those of the catalogue and those that are given. Sizes, context, licence and languages are taken from the hub;
family and kind stay, or are guessed for a new one. A model that cannot be read is left as it is, and said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from llmtune.model.catalogue import CatalogueModel, read_catalogue

FILE = Path(__file__).parent.parent / "llmtune" / "model" / "catalogue.yaml"
HEAD = """\
# Models of today, as their config.json on the hub has them. Made anew by `python docs/catalogue.py` on a network.
# `config`: what the memory plan needs, under the configuration's own names; `languages`: those that the card names.
"""
SIZES = (
    *(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    ),
    *("vocab_size", "tie_word_embeddings", "n_embd", "n_layer", "n_head", "dim", "n_layers", "n_heads", "hidden_dim"),
    *("d_model", "num_layers", "num_decoder_layers", "num_heads", "d_ff", "d_kv", "feed_forward_proj"),
    *("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "num_mel_bins"),
)
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
    config = config.get("text_config", config)
    licence = card.get("license_name") if card.get("license") == "other" else card.get("license")
    languages = card.get("language") or (known.languages if known else ["en"])
    context = next((config[key] for key in CONTEXTS if config.get(key)), known.context if known else 512)
    sizes = {key: config[key] for key in SIZES if config.get(key) is not None}
    kind = known.kind if known else guess_kind(config)
    return {
        "family": known.family if known else name.rpartition("/")[2].split("-")[0],
        "kind": kind,
        "licence": licence or (known.licence if known else "other"),
        "languages": [languages] if isinstance(languages, str) else list(languages),
        "context": context,
        "parameters": count_parameters(kind, config["model_type"], sizes),
        "model_type": config["model_type"],
        "config": sizes,
    }


def count_parameters(kind: str, model_type: str, sizes: dict[str, Any]) -> int:
    """Count the parameters of a model of this shape; an encoder's without a head."""
    with torch.device("meta"):
        built = CLASSES[kind].from_config(AutoConfig.for_model(model_type, **sizes))
    return sum(parameter.numel() for parameter in built.parameters())


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
    names = ("family", "kind", "licence", "languages", "context", "parameters", "model_type", "config")
    return {name: getattr(model, name) for name in names}


def flow(value: Any) -> str:
    """Write a value on one line of YAML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    return json.dumps(value) if isinstance(value, bool) or value in ("no", "on") else str(value)


if __name__ == "__main__":
    sys.exit(main())
