"""The merged model in 4 or 8 bits, in the compressed-tensors format of vLLM, and certified against the tuned model.

Shapes: O outputs and G groups of inputs with one scale of a layer; T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmtune.adapter.merging import check_mergeable
from llmtune.data.examples import ExampleReader
from llmtune.deploy.base_checkpoint import check_processor, describe_checkpoint
from llmtune.deploy.export import ExportFormat, WrittenExport
from llmtune.deploy.exported_model import ModelSource, check_pictures, open_folder
from llmtune.deploy.gptq import find_scales, round_layers
from llmtune.deploy.merged_model import merge_to, save_merged, weight_facts
from llmtune.deploy.parity import Limits, describe_parity
from llmtune.deploy.parity_reference import TunedReference
from llmtune.deploy.tuned_model import TunedModel, training_base
from llmtune.display.console import spinner
from llmtune.display.number_format import size
from llmtune.errors import RecipeError, nearest
from llmtune.model.config import build_skeleton, expert_parameters, find_class, head_names, in_heads, read_model_config
from llmtune.model.towers import find_towers
from llmtune.recipe.extras import require_extra
from llmtune.store.atomic_files import read_json, write_json

DTYPE = torch.bfloat16
"""Of the scales and of the weights that stay: vLLM computes in 16 bits."""
CALIBRATION_ROWS = 64
GROUP_SIZES = (128, 64, 32)
"""Numbers of weights that share a 4-bit scale, as vLLM supports them: the largest that divides all layers' inputs."""
WITH_BARS = ("quantization.lifecycle.apply", "offload.dispatch", "compressors.model_compressors.model_compressor")
"""Modules of compressed-tensors whose progress bars have no switch."""
MERGE_INSTEAD = "Use `llmtune deploy merge`."


@dataclass(frozen=True)
class QuantizationScheme:
    """A scheme of compressed-tensors."""

    preset: str
    """Its name in compressed-tensors."""
    bits: int
    calibrated: bool
    """Whether the weights are rounded by the layers' inputs on training rows. Eight bits of a float need none."""
    limits: Limits


SCHEMES = {
    "w4a16": QuantizationScheme("W4A16", 4, True, Limits(kl_floor=6e-1, kl_cap=6e-1, top1=0.55)),
    "w8a8": QuantizationScheme("W8A8", 8, True, Limits(kl_floor=2e-1, kl_cap=2e-1, top1=0.7)),
    "fp8": QuantizationScheme("FP8_DYNAMIC", 8, False, Limits(kl_floor=1.5e-1, kl_cap=1.5e-1, top1=0.6)),
}
"""w4a16: weights in groups with one scale. w8a8 and fp8: a scale for each output, and one for each token's inputs,
which are rounded while computing. The limits are at least twice the rounding's effect on SmolLM2 135M: a mean KL of
0.23 in w4a16 (four times that if rounded to the nearest), 0.08 in w8a8 and 0.07 in fp8. `find_lost_adapter` detects a
missing adapter."""


def quantized_format(scheme: str) -> ExportFormat:
    """Return the format of model folders in a scheme of compressed-tensors."""
    return ExportFormat(
        f"quantized/{scheme}",
        "the quantised model",
        check=partial(check_quantizable, scheme=scheme),
        write=partial(write_quantized, scheme=scheme),
        open=lambda folder, reference: open_folder(folder, reference.tuned, scheme),
        describe=lambda certificate, out: [
            f"{scheme} model: {out} ({size(certificate['weights_bytes'])})",
            f"  {describe_parity(certificate['measured'])}",
            *describe_checkpoint(certificate),
        ],
    )


def check_quantizable(source: ModelSource, scheme: str) -> int:
    """Check without loading weights that a model can be quantised; return the group size of its 4-bit weights."""
    if scheme not in SCHEMES:
        what = f"{scheme!r} is not a quantization scheme.{nearest(scheme, [*SCHEMES])}"
        raise RecipeError.of(what, "--scheme", f"Choose one of: {', '.join(SCHEMES)}.")
    require_extra("quantized", "--scheme")
    recipe, name = source.recipe, source.model_ref.name
    check_pictures(source, "deploy", MERGE_INSTEAD)
    check_mergeable(recipe.adapter.method, recipe.adapter.options)
    check_processor(source, scheme)
    if not source.task.model_kind.decodes:
        what = f"vLLM reads this format for models that continue a text, not for {source.task.model_kind.auto_class}"
        raise RecipeError.of(what, "task", MERGE_INSTEAD)
    if getattr(read_model_config(source.model_ref, recipe.model), "quantization_config", None):
        what = f"the weights of {name} are already quantised; rounding them again would lose more"
        raise RecipeError.of(what, "model.name", f"Train on the original model. {MERGE_INSTEAD}")
    skeleton = build_skeleton(*find_class(source.model_ref, recipe, source.task), recipe)
    layers = linear_layers(skeleton)
    if expert_parameters(skeleton) or not layers:
        kind = "fused experts" if layers else "no linear layers"
        raise RecipeError.of(
            f"{name} has {kind}, which compressed-tensors cannot quantise", "model.name", MERGE_INSTEAD
        )
    inputs = {layer.in_features for layer in layers.values()}
    fitting = [group for group in GROUP_SIZES if not any(count % group for count in inputs)]
    if scheme == "w4a16" and not fitting:
        what = f"layers of {name} have {min(inputs)} inputs, but 4-bit weights share scales in groups of at least 32"
        raise RecipeError.of(what, "--scheme", "Use w8a8 or fp8.")
    return next(iter(fitting), 0)


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """Return the linear layers to quantise, by name: all except the head."""
    heads = head_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not in_heads(name, heads)
    }


def _ignore_towers(folder: Path, complete: PreTrainedModel) -> None:
    """Name the linear layers of the towers, which are not quantised, in a saved configuration."""
    config, towers = read_json(folder / "config.json"), find_towers(complete)
    names = [name for name, module in complete.named_modules() if isinstance(module, torch.nn.Linear)]
    config["quantization_config"]["ignore"] += [name for name in names if in_heads(name, towers)]
    write_json(folder / "config.json", config)


def sample_texts(tuned: TunedModel) -> list[Sequence[int]]:
    """Return the ids of up to CALIBRATION_ROWS training rows, spread over all."""
    assert tuned.examples is not None, "a run has encoded rows"
    reader = ExampleReader(tuned.examples, "train")
    total = min(len(reader), CALIBRATION_ROWS)
    return [reader[len(reader) * at // total].input_ids for at in range(total)]


def write_quantized(reference: TunedReference, folder: Path, scheme: str) -> WrittenExport:
    """Merge, quantise on training rows, and save."""
    tuned, settings = reference.tuned, SCHEMES[scheme]
    onto, group_size = training_base(tuned.recipe, tuned.model_ref), check_quantizable(tuned, scheme)
    texts = sample_texts(tuned) if settings.calibrated else []
    if reference.checkpoint is not None:
        reference.checkpoint.ask_picture()
    with spinner(tuned.console, f"merging and quantising to {scheme}"):
        merged = merge_to(tuned, onto, torch.float32).eval()
        compressor = compress(merged, settings, group_size, texts)
        save_merged(merged, reference, folder, DTYPE)
        compressor.update_config(folder)
        if reference.checkpoint is not None:
            _ignore_towers(folder, reference.checkpoint.skeleton)
    facts = {
        "method": tuned.adapted.method,
        "onto": onto,
        "scheme": scheme,
        "group_size": group_size if scheme == "w4a16" else None,
        "calibration_rows": len(texts),
        "compressed_tensors": version("compressed-tensors"),
        **weight_facts(folder),
    }
    return WrittenExport(facts, settings.limits, "" if scheme == "w8a8" else "Round less: --scheme w8a8. ")


@torch.no_grad()
def compress(
    model: PreTrainedModel, scheme: QuantizationScheme, group_size: int, texts: Sequence[Sequence[int]]
) -> Any:
    """Quantise a model's linear layers in place; return what adds them to a saved configuration."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    for name in WITH_BARS:
        vars(import_module(f"compressed_tensors.{name}"))["tqdm"] = lambda items, **options: items
    layers = linear_layers(model)
    preset = preset_name_to_scheme(scheme.preset, ["Linear"])
    if preset.weights.group_size:
        preset.weights.group_size = group_size
    scales = {
        name: (
            find_scales(layer.weight, preset.weights.group_size or layer.in_features, scheme.bits)
            if scheme.calibrated
            else layer.weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        )
        .to(DTYPE)  # as they are stored
        .float()
        for name, layer in layers.items()
    }

    def read() -> None:
        for ids in texts:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)

    if scheme.calibrated:
        round_layers(layers, scales, scheme.bits, read)
    others = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name not in layers
    ]
    config = QuantizationConfig(config_groups={"group_0": preset}, ignore=others, quantization_status="compressed")
    apply_quantization_config(model, config)
    for name, layer in layers.items():
        layer.get_parameter("weight_scale").copy_(scales[name])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:  # not packed weights, which may be floats of 8 bits
            parameter.data = parameter.data.to(DTYPE)
    return compressor
