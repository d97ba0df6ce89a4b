"""A smaller model of the same family, made of some layers of another: a student whose teacher has the same tokenizer.

Layers are taken evenly, with the first and the last, as DistilBERT took every other layer of BERT (Sanh et al., 2019).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.config import architecture_class, read_model_config
from llmtune.model.loading import load_plain
from llmtune.model.quantized_base import kept_quantization
from llmtune.model.resolve import resolve_model
from llmtune.recipe.model_section import ModelSection
from llmtune.records import Json, ModelRef
from llmtune.store.atomic_files import explained, staged

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", ".*")
"""Files that are not copied."""


def shrink_model(name: str, layers: int, out: Path, console: Console, offline: bool = False) -> Json:
    """Save a model with `layers` of the layers of the model `name` to the folder `out`; return what was kept.

    Raises:
        RecipeError: it has no more layers than that, or is of a kind that cannot be cut; or `out` exists.
        EnvironmentProblem: the model cannot be found or loaded, or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError.of("this folder is not empty", str(out), "Choose another folder with --out.")
    section = ModelSection(name=name)
    model_ref = resolve_model(name, section, console, offline)
    config = read_model_config(model_ref, section)
    count = _count_layers(config, name)
    if not 2 <= layers < count:
        fix = f"Choose a number from 2 to {count - 1}." if count > 2 else "Use a model with more layers."
        raise RecipeError.of(f"{name} has {count} layers, so it cannot be cut to {layers}", "--layers", fix)
    kept = [(i * (count - 1) + (layers - 1) // 2) // (layers - 1) for i in range(layers)]
    dtype = getattr(config, "dtype", None) or torch.float32
    model = load_plain(model_ref, config, section, dtype=dtype, device="cpu")
    before = model.num_parameters()
    _cut_layers(model, kept, count, name)
    with explained(out), staged(out) as folder:
        shutil.copytree(model_ref.path, folder, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        model.save_pretrained(folder)
        _check_saved(model, ModelRef(name, folder, None, ""), section, dtype)
    return {"folder": str(out), "layers": count, "kept": kept, "parameters": [before, model.num_parameters()]}


def _count_layers(config: PreTrainedConfig, name: str) -> int:
    """Return the number of layers of a model with one stack of layers. Raises RecipeError for others."""
    text = config.get_text_config()
    reasons = {
        "it has an encoder and a decoder": getattr(config, "is_encoder_decoder", False),
        "it also reads pictures or sound": text is not config,
        "its weights are quantised": kept_quantization(config) is not None,
        "its configuration states no number of layers": not getattr(text, "num_hidden_layers", None),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise RecipeError.of(f"{name} cannot be cut: {reason}", "BASE", "Name a decoder or an encoder of text.")
    return int(text.num_hidden_layers)


def _cut_layers(model: PreTrainedModel, kept: list[int], count: int, name: str) -> None:
    """Remove the other layers from a model and its configuration, in place."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    if len(stacks) != 1:
        what = f"{name} cannot be cut: it has {len(stacks)} lists of {count} layers, not one"
        raise RecipeError.of(what, "BASE", "Name a model with one stack of layers.")
    (stack,), config = stacks, model.config
    for i in range(count - 1, -1, -1):
        if i not in kept:
            del stack[i]
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == count:  # such as each layer's attention
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _check_saved(model: PreTrainedModel, saved: ModelRef, section: ModelSection, dtype: torch.dtype) -> None:
    """Raise EnvironmentProblem unless the saved model computes the same as the one in memory."""
    config = read_model_config(saved, section)
    reopened, report = architecture_class(config, False).from_pretrained(
        str(saved.path), dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    for one in (model, reopened):
        one.config.use_cache = False  # layers in memory still have their old numbers in a cache
    ids_BT = (torch.arange(16) % config.vocab_size)[None]
    with torch.no_grad():
        first, second = (one.eval()(input_ids=ids_BT)[0] for one in (model, reopened))
    if report["missing_keys"] or report["unexpected_keys"] or not torch.equal(first, second):
        what = f"{saved.name} is of type {config.model_type}, whose layers cannot be cut: it would compute differently"
        raise EnvironmentProblem.of(what, "BASE", "Name a model of another type.")
