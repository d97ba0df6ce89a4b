"""A LoRA adapter as a GGUF file, used with the base model's file: `llama-cli -m BASE --lora ADAPTER`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from llmtune.deploy.gguf_converter import FORMATS, TensorLayout
from llmtune.errors import EnvironmentProblem, GateFailed, Problem, RecipeError
from llmtune.model.causal_lm_loss import unwrap

ADAPTER_FORMATS = ("f32", "f16")
ROUNDING = {"f32": 1e-5, "f16": 2e-3}
"""Maximum relative error of a product in the file: two roundings of 2^-11 in F16."""
_FIX = "Omit --adapter-only to write the complete model."


def check_lora_only(model: PreTrainedModel | PeftModel) -> None:
    """Raise RecipeError listing all parts of an adapter that the GGUF adapter would lack."""
    if not isinstance(model, PeftModel):
        raise RecipeError.of("this run trained all weights and has no adapter", "--adapter-only", _FIX)
    kind = model.peft_config["default"].peft_type
    if kind != PeftType.LORA:
        raise RecipeError.of(
            f"llama.cpp supports only LoRA adapters, and this one is {kind.lower()}", "--adapter-only", _FIX
        )
    config, inner = _lora_config(model), unwrap(model)
    embeddings = [inner.get_input_embeddings()]
    if inner.config.tie_word_embeddings:
        embeddings.append(inner.get_output_embeddings())
    unsupported = {
        "DoRA (use_dora)": config.use_dora,
        "trained biases (bias)": config.bias != "none" or config.lora_bias,
        "fully trained modules (modules_to_save)": bool(config.modules_to_save),
        "trained tokens (trainable_token_indices)": bool(config.trainable_token_indices),
        "an adapter on fused experts (target_parameters)": bool(config.target_parameters),
        "activated LoRA (alora_invocation_tokens)": bool(config.alora_invocation_tokens),
        "an adapter on the embedding": any(isinstance(layer, LoraLayer) for layer in embeddings),
    }
    problems = [what for what, present in unsupported.items() if present]
    RecipeError.collect(
        Problem(f"llmtune does not write {what} into a GGUF adapter", "--adapter-only", _FIX) for what in problems
    )


def _lora_config(model: PeftModel) -> LoraConfig:
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig), "llmtune trains LoRA adapters only"
    return config


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the modules with an adapter, by the names of their weights."""
    for module, layer in unwrap(model).named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            yield f"{module}.weight", layer


def lora_tensors(model: PeftModel, layout: TensorLayout) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices A [rank, in] and B [out, rank] of each module by llama.cpp's names, in float32 on the CPU.

    llama.cpp scales each product by alpha / rank with one alpha for all. If a module has another scaling (rsLoRA,
    alpha_pattern), B absorbs the difference.
    """
    alpha = float(_lora_config(model).lora_alpha)
    for weight, layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rest = layer.scaling["default"] * a.shape[0] / alpha
        name, converted = layout.convert(b, weight)
        yield f"{name}.lora_a", a.detach().float().cpu()
        yield f"{name}.lora_b", converted * rest


def write_adapter(model: PeftModel, file: Path, number_format: str, name: str) -> None:
    """Write the adapter; raises EnvironmentProblem if llama.cpp has no name for a module."""
    layout = TensorLayout(unwrap(model).config)
    writer = GGUFWriter(file, layout.architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(_lora_config(model).lora_alpha))
    writer.add_file_type(FORMATS[number_format])
    kind = GGMLQuantizationType[number_format.upper()]
    for tensor_name, tensor in lora_tensors(model, layout):
        writer.add_tensor(tensor_name, quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def compare_adapter(model: PeftModel, file: Path, number_format: str) -> dict[str, float]:
    """Read the file back and compare each module's product with what PEFT adds to its weight.

    Returns:
        `modules`, and `largest_difference` relative to the product's norm.

    Raises:
        GateFailed: a module is missing, or its product differs by more than the rounding of the format.
    """
    layout, reader = TensorLayout(unwrap(model).config), GGUFReader(file)
    alpha = reader.fields[Keys.Adapter.LORA_ALPHA].contents()
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    differences = {}
    for weight, layer in lora_layers(model):
        name, expected = layout.convert(layer.get_delta_weight("default"), weight)
        a, b = (torch.from_numpy(tensors[f"{name}.lora_{half}"].copy()) for half in "ab")
        actual = alpha / a.shape[0] * (b @ a)
        differences[name] = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= ROUNDING[number_format]:
        what = f"the file's change of {worst} differs from the trained one by {differences[worst]:.2g} of its size"
        raise GateFailed.of(f"{what}; the limit is {ROUNDING[number_format]:.2g}")
    if len(tensors) != 2 * len(differences):
        raise EnvironmentProblem.of("the file contains other modules than were trained", str(file))
    return {"modules": len(differences), "largest_difference": differences[worst]}
