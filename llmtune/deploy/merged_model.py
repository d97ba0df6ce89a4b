"""The adapter merged into its base, saved as a plain model folder, and certified against the adapter."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmtune.adapter.merging import check_mergeable
from llmtune.adapter.merging import merge_adapter as merge_weights
from llmtune.adapter.saving import writing_weights
from llmtune.deploy.base_checkpoint import check_processor, describe_checkpoint
from llmtune.deploy.export import ExportFormat, WrittenExport
from llmtune.deploy.exported_model import ModelSource, check_pictures, open_folder
from llmtune.deploy.folder_settings import expected_generation
from llmtune.deploy.parity import LIMITS, Certificate, Onto, check_onto, describe_distance, describe_parity
from llmtune.deploy.parity_reference import TunedReference
from llmtune.deploy.tuned_model import TunedModel, training_base
from llmtune.display.console import spinner
from llmtune.display.number_format import size
from llmtune.errors import Problem, RecipeError
from llmtune.model.base_tensors import copy_other_tensors
from llmtune.model.config import OTHER_CLASSES, OTHER_ORDER, in_heads, read_model_config
from llmtune.model.device import is_out_of_memory, release_memory
from llmtune.model.processor import PROCESSOR_FILES, save_tokenizer
from llmtune.model.quantized_base import kept_quantization
from llmtune.model.towers import find_towers, image_text_class, remove_towers, take_text, text_class
from llmtune.store.atomic_files import hash_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_SIZE = "5GB"


def merged_format(onto: str | None = None, dtype: str = "auto", text_only: bool = False) -> ExportFormat:
    """Return the format of plain model folders, merged onto the `original` or `dequantized` weights of the base.

    By default these are the weights used in training, and the number format is that of training. With `text_only`, the
    language model of a checkpoint that also reads images is a folder of its own.
    """
    return ExportFormat(
        "merged",
        "the merged model",
        check=partial(check_merge, onto=onto, dtype=dtype, text_only=text_only),
        write=partial(write_merged, onto=onto, dtype=dtype, text_only=text_only),
        open=lambda folder, reference: open_folder(folder, reference.tuned, "merged"),
        describe=_describe_merged,
    )


def check_merge(source: ModelSource, onto: str | None = None, dtype: str = "auto", text_only: bool = False) -> None:
    """Raise RecipeError for an adapter that cannot be merged, and for an invalid option.

    Raises EnvironmentProblem for a base that reads images and has no working processor, unless only its text is merged.
    """
    check_mergeable(source.recipe.adapter.method, source.recipe.adapter.options)
    config = read_model_config(source.model_ref, source.recipe.model)
    if text_only:
        _check_text(source, config)
    else:
        check_processor(source, "merged")
    stays_quantized = kept_quantization(config) is not None
    quantized = stays_quantized or source.recipe.adapter.method == "qlora"
    problems = [*check_onto(onto, quantized, not stays_quantized)] if onto is not None else []
    if dtype != "auto" and dtype not in DTYPES:
        problems.append(Problem(f"{dtype!r} is not a number format", "--dtype", f"Choose auto, {', '.join(DTYPES)}."))
    RecipeError.collect(problems)


def _check_text(source: ModelSource, config: PretrainedConfig) -> None:
    name = source.model_ref.name
    check_pictures(source, "--text-only", "Omit it.")
    if image_text_class(config) is None:
        raise RecipeError.of(f"{name} reads text alone", "--text-only", "Omit it.")
    if not source.task.model_kind.decodes or text_class(config) is None:
        what = f"transformers has no class for the text of {name} ({config.get_text_config().model_type}) alone"
        raise RecipeError.of(what, "--text-only", "Merge the complete model: omit --text-only.")


def write_merged(
    reference: TunedReference, folder: Path, onto: str | None, dtype: str, text_only: bool = False
) -> WrittenExport:
    """Merge the adapter, and save the model with tokenizer and template.

    A 4-bit adapter is also merged onto the other weights in memory, to measure how far that model would be.
    """
    tuned = reference.tuned
    base = cast(Onto, onto or training_base(tuned.recipe, tuned.model_ref))
    target_dtype = _trained_dtype(tuned) if dtype == "auto" else DTYPES[dtype]
    quantized = tuned.adapted.selected.quantized
    original = tuned.adapted.selected.base_quantization is None
    exact = target_dtype == _trained_dtype(tuned) == torch.float32
    limits = LIMITS["other base" if quantized and base == "original" else "exact" if exact else "rounded"]
    advice = "" if target_dtype == torch.float32 else "Merge without rounding: --dtype float32. "
    if quantized and base == "original":
        advice = "Merge onto the training weights: --onto dequantized. "
    other = _compare_other_base(reference, base) if quantized and original else None
    if text_only:
        reference.checkpoint = None
    if reference.checkpoint is not None:
        reference.checkpoint.ask_picture()
    with spinner(tuned.console, "merging and saving"):
        merged = merge_to(tuned, base, target_dtype)
        save_merged(take_text(merged) if text_only else merged, reference, folder, target_dtype)
    for name in PROCESSOR_FILES if text_only else ():
        (folder / name).unlink(missing_ok=True)
    facts = {
        "method": tuned.adapted.method,
        "onto": base,
        "dtype": str(target_dtype).removeprefix("torch."),
        **weight_facts(folder),
        "other": other,
        **({"text_only": True} if text_only else {}),
    }
    return WrittenExport(facts, limits, advice)


def _trained_dtype(tuned: TunedModel) -> torch.dtype:
    model = tuned.adapted.selected.model
    if tuned.adapted.selected.quantized and not tuned.adapted.selected.base_quantization:
        return cast(torch.dtype, model.config.quantization_config.bnb_4bit_compute_dtype)
    return cast(torch.dtype, model.dtype)


def merge_to(tuned: TunedModel, onto: Onto, dtype: torch.dtype) -> PreTrainedModel:
    """Return the merged model in `dtype`; this consumes `tuned`."""
    selected = tuned.adapted.selected
    if not selected.quantized and selected.model.dtype != dtype:
        tuned.model.float()  # to round sums only once, to the target format
    return cast(PreTrainedModel, merge_weights(tuned.adapted, onto).to(dtype))


def _compare_other_base(reference: TunedReference, onto: Onto) -> Certificate:
    """Merge a 4-bit adapter onto the other weights in memory, and measure how far that model is."""
    tuned = reference.tuned
    other: Onto = "original" if onto == "dequantized" else "dequantized"
    needed = tuned.adapted.total * _trained_dtype(tuned).itemsize
    if tuned.adapted.selected.model.device.type == "cpu" and needed > psutil.virtual_memory().available:
        return {"onto": other, "not_measured": f"the model needs {needed / 1e9:,.1f} GB, more than is free"}
    started = time.perf_counter()
    with spinner(tuned.console, f"merging onto the {other} weights as well, to compare"):
        try:
            logits = reference.read_logits(cast(PreTrainedModel, merge_weights(tuned.adapted, other)))
            numbers: Certificate = asdict(reference.compare(logits))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            numbers = {"not_measured": "memory ran out"}
    release_memory()
    return {"onto": other, **numbers, "seconds": time.perf_counter() - started}


def save_merged(merged: PreTrainedModel, reference: TunedReference, folder: Path, dtype: torch.dtype) -> None:
    """Save a model with tokenizer, chat template and the recipe's generation settings, and the base's towers."""
    save_settings(merged, reference.tuned, folder, dtype)
    checkpoint, weights = reference.checkpoint, None
    if checkpoint is not None and checkpoint.trained:
        towers = find_towers(merged)
        weights = {
            name: part
            for name, part in merged.state_dict().items()
            if in_heads(name, checkpoint.trained) or not in_heads(name, towers)
        }
    else:
        remove_towers(merged)  # those in memory may have another format than the base's
    with writing_weights(folder):
        merged.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
        if checkpoint is not None:
            copy_other_tensors(checkpoint.folder, checkpoint.skeleton, folder, checkpoint.trained)


def save_settings(merged: PreTrainedModel, tuned: TunedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write everything but the weights: configuration, generation settings, tokenizer and template."""
    if merged.can_generate():
        merged.generation_config = expected_generation(merged, tuned)
        merged.generation_config.save_pretrained(folder)
    merged.config.dtype = dtype
    merged.config.architectures = [type(merged).__name__]
    for name in (OTHER_CLASSES, OTHER_ORDER):  # llmtune's marks on the loaded model
        vars(merged.config).pop(name, None)
    merged.config.save_pretrained(folder)
    save_tokenizer(tuned.processor, folder)
    tuned.task.save_files(folder, merged.config, tuned.recipe)


def weight_facts(folder: Path) -> Certificate:
    """Return the certificate's fields about the files with weights."""
    weights = sorted(folder.glob("*.safetensors"))
    return {
        "weights_bytes": sum(file.stat().st_size for file in weights),
        "files": [file.name for file in weights],
        "files_sha256": {file.name: hash_file(file) for file in weights},
    }


def _describe_merged(certificate: Certificate, out: Path) -> list[str]:
    lines = [
        f"merged model: {out} ({size(certificate['weights_bytes'])}, {certificate['dtype']})",
        "parity with the adapter is within all limits of its certificate",
        f"  {describe_parity(certificate['measured'])}",
        *describe_checkpoint(certificate),
    ]
    if other := certificate["other"]:
        numbers = f": not measured, because {other.get('not_measured')}"
        if "not_measured" not in other:
            numbers = f" it would be: {describe_distance(other)} (measured in {other['seconds']:.0f} s)"
        lines.append(f"merged onto the {other['onto']} weights instead{numbers}")
    return lines
