"""A LoRA adapter as llama.cpp reads it beside the base model's own GGUF file: `llama-cli -m BASE --lora ADAPTER`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFType, GGUFWriter, Keys, get_tensor_name_map
from gguf.quants import dequantize
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from llmtune.deploy.gguf_architectures import Family, arrange, find_family, name_tensor
from llmtune.deploy.gguf_file import FORMATS, write_tensors
from llmtune.errors import EnvironmentProblem, GateFailed, Problem, RecipeError

ADAPTER_FORMATS = ("f32", "f16")
ROUNDING = {"f32": 1e-5, "f16": 2e-3}
"""How far a product of the file may be from what was trained, as a share of its size: two roundings of 2^-11 in F16."""


@dataclass(frozen=True)
class Pair:
    """The two matrices of one module: A [rank, in], and B [out, rank] with the module's own scaling in it."""

    name: str
    a: torch.Tensor
    b: torch.Tensor


def check_adapter(model: torch.nn.Module) -> None:
    """Raise RecipeError with everything of an adapter that llama.cpp has no place for."""
    if not isinstance(model, PeftModel):
        raise RecipeError.of("this run trained all weights: there is no adapter", "--adapter-only", "Leave it out.")
    config: Any = model.peft_config["default"]
    refused = {
        "DoRA (use_dora)": getattr(config, "use_dora", False),
        "trained biases (bias)": getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False),
        "modules that are trained whole (modules_to_save)": bool(config.modules_to_save),
        "tokens that are trained (trainable_token_indices)": bool(getattr(config, "trainable_token_indices", None)),
        "an adapter on the embedding": _on_embedding(model),
    }
    RecipeError.collect(
        Problem(f"llama.cpp's adapters have no place for {what}", "--adapter-only", "Leave it out: the whole model.")
        for what, there in refused.items()
        if there
    )


def _on_embedding(model: PeftModel) -> bool:
    outer: Any = model.get_base_model()
    layers = [outer.get_input_embeddings()]
    if outer.config.tie_word_embeddings:
        layers.append(outer.get_output_embeddings())
    return any(isinstance(layer, LoraLayer) for layer in layers)


def list_pairs(model: PeftModel, family: Family) -> Iterator[Pair]:
    """Yield the pairs by llama.cpp's names, in float32 on the CPU.

    llama.cpp scales each product by alpha / rank with one alpha for all. Where a module has another scaling (rsLoRA,
    alpha_pattern), what is left of it goes into B.
    """
    inner: Any = model.get_base_model()
    config, alpha = inner.config, alpha_of(model)
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    for module, layer in inner.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            left = layer.scaling["default"] * a.shape[0] / alpha
            rows = arrange(b, f"{module}.weight", config, family)
            yield Pair(name_tensor(f"{module}.weight", names), a.detach().float().cpu(), rows * left)


def alpha_of(model: PeftModel) -> float:
    """Return the alpha that the file names."""
    config: Any = model.peft_config["default"]
    return float(config.lora_alpha)


def write_adapter(model: PeftModel, file: Path, number_format: str, name: str) -> None:
    """Write the adapter."""
    base: Any = model.get_base_model()
    family = find_family(base.config)
    writer = GGUFWriter(file, family.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha_of(model))
    writer.add_file_type(FORMATS[number_format].marked)

    def halves() -> Iterator[tuple[str, torch.Tensor]]:
        for pair in list_pairs(model, family):
            yield f"{pair.name}.lora_a", pair.a
            yield f"{pair.name}.lora_b", pair.b

    write_tensors(writer, halves, FORMATS[number_format].stored)


def compare_adapter(model: PeftModel, file: Path, number_format: str) -> dict[str, Any]:
    """Read the file back and hold each module's product against what PEFT adds to its weight.

    Returns:
        `modules`, and `largest_difference` as a share of the product's size.

    Raises:
        GateFailed: a module is missing, or its product differs by more than the rounding of the format.
    """
    base: Any = model.get_base_model()
    family = find_family(base.config)
    reader = GGUFReader(file)
    alpha = reader.fields[Keys.Adapter.LORA_ALPHA].contents()
    found = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = get_tensor_name_map(family.arch, base.config.num_hidden_layers)
    differences = {}
    for module, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            name = name_tensor(f"{module}.weight", names)
            wanted = arrange(layer.get_delta_weight("default"), f"{module}.weight", base.config, family)
            a, b = (torch.from_numpy(found[f"{name}.lora_{half}"].copy()) for half in "ab")
            got = alpha / a.shape[0] * (b @ a)
            differences[name] = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= ROUNDING[number_format]:
        said = f"what the file adds to {worst} differs from what was trained by {differences[worst]:.2g} of its size"
        raise GateFailed.of(f"{said}, and at most {ROUNDING[number_format]:.2g} is admitted")
    if len(found) != 2 * len(differences):
        raise EnvironmentProblem.of("the file holds other modules than were trained", str(file))
    return {"modules": len(differences), "largest_difference": differences[worst]}
