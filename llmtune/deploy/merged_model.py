"""The adapter merged into its base, saved as a plain model folder, and certified against the adapter."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import torch
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.adapter.merging import check_mergeable
from llmtune.adapter.merging import merge_adapter as merge_weights
from llmtune.adapter.saving import writing_weights
from llmtune.deploy.export_score import export_run
from llmtune.deploy.exported_model import open_folder
from llmtune.deploy.folder_settings import expected_generation
from llmtune.deploy.parity import (
    LIMITS,
    Certificate,
    Onto,
    check_onto,
    check_output,
    describe_distance,
    describe_parity,
    write_certificate,
)
from llmtune.deploy.parity_reference import TunedReference
from llmtune.deploy.search_parity import make_reference
from llmtune.deploy.tuned_model import TunedModel, training_base
from llmtune.display.console import spinner
from llmtune.errors import Problem, RecipeError
from llmtune.model.config import OTHER_CLASSES, OTHER_ORDER
from llmtune.model.device import explain_oom, is_out_of_memory, release_memory
from llmtune.model.processor import save_tokenizer
from llmtune.plan import RunContext
from llmtune.store.atomic_files import explained, hash_file, staged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_SIZE = "5GB"


def merge_run(
    context: RunContext, out: Path | None = None, *, onto: str | None = None, dtype: str = "auto"
) -> Certificate:
    """Merge the adapter of a finished run, by default into the run's `merged` and onto its training base."""
    folder = out or context.folder.path / "merged"
    onto = onto or training_base(context.plan.recipe, context.plan.model_ref)

    def make(tuned: TunedModel, out: Path) -> Certificate:
        return merge_model(tuned, out, context.console, onto=onto, dtype=dtype)

    open_merged = partial(open_folder, name="merged")
    return export_run(context, folder, make, open_merged, splits=("test", "validation", "train"))


def merge_model(
    tuned: TunedModel, out: Path, console: Console, *, onto: str = "original", dtype: str = "auto"
) -> Certificate:
    """Merge, save to `out` (safetensors, tokenizer, template, certificate), reload, and compare with the adapter.

    This consumes `tuned`. Return the certificate; on failure `out` stays empty.

    Raises:
        RecipeError: unknown `onto` or `dtype`, or `out` contains something else.
        GateFailed: the merged model differs from the tuned model by more than the limits.
        EnvironmentProblem: the saved folder cannot be loaded; disk or memory is full, or permission is denied.
    """
    target_dtype = _check_merge(tuned, out, onto, dtype)
    base = cast(Onto, onto)
    quantized = tuned.adapted.selected.quantized
    original = tuned.adapted.selected.base_quantization is None
    exact = target_dtype == _trained_dtype(tuned) == torch.float32
    limits = LIMITS["other base" if quantized and onto == "original" else "exact" if exact else "rounded"]
    with spinner(console, "asking the tuned model"):
        reference = make_reference(tuned)
    with explained(out), explain_oom(f"merging {tuned.model_ref.name}", tuned.device), staged(out) as folder:
        other = _compare_other_base(tuned, base, reference, console) if quantized and original else None
        with spinner(console, "merging and saving"):
            save_merged(merge_to(tuned, base, target_dtype), tuned, folder, target_dtype)
        with spinner(console, "asking the merged model, read back from disk"):
            certified = reference.certify(open_folder(folder, tuned), limits)
        certificate = {
            **certified,
            "method": tuned.adapted.method,
            "onto": onto,
            "dtype": str(target_dtype).removeprefix("torch."),
            **weight_facts(folder),
            "other": other,
        }
        write_certificate(certificate, folder, out, "the merged model", _advice(certificate, quantized))
    _print_merge(certificate, out, console)
    return certificate


def _check_merge(tuned: TunedModel, out: Path, onto: str, dtype: str) -> torch.dtype:
    check_mergeable(tuned.adapted)
    selected = tuned.adapted.selected
    problems = [*check_output(out), *check_onto(onto, selected.quantized, selected.base_quantization is None)]
    if dtype != "auto" and dtype not in DTYPES:
        problems.append(Problem(f"{dtype!r} is not a number format", "--dtype", f"Choose auto, {', '.join(DTYPES)}."))
    RecipeError.collect(problems)
    return _trained_dtype(tuned) if dtype == "auto" else DTYPES[dtype]


def _trained_dtype(tuned: TunedModel) -> torch.dtype:
    model = tuned.adapted.selected.model
    if tuned.adapted.selected.quantized and not tuned.adapted.selected.base_quantization:
        return cast(torch.dtype, model.config.quantization_config.bnb_4bit_compute_dtype)
    return cast(torch.dtype, model.dtype)


def _advice(certificate: Certificate, quantized: bool) -> str:
    if quantized and certificate["onto"] == "original":
        return "Merge onto the training weights: --onto dequantized. "
    return "" if certificate["dtype"] == "float32" else "Merge without rounding: --dtype float32. "


def merge_to(tuned: TunedModel, onto: Onto, dtype: torch.dtype) -> PreTrainedModel:
    """Return the merged model in `dtype`; this consumes `tuned`."""
    selected = tuned.adapted.selected
    if not selected.quantized and selected.model.dtype != dtype:
        tuned.model.float()  # to round sums only once, to the target format
    return cast(PreTrainedModel, merge_weights(tuned.adapted, onto).to(dtype))


def _compare_other_base(tuned: TunedModel, onto: Onto, reference: TunedReference, console: Console) -> Certificate:
    """Merge a 4-bit adapter onto the other weights in memory, and measure how far that model is."""
    other: Onto = "original" if onto == "dequantized" else "dequantized"
    needed = tuned.adapted.total * _trained_dtype(tuned).itemsize
    if tuned.adapted.selected.model.device.type == "cpu" and needed > psutil.virtual_memory().available:
        return {"onto": other, "not_measured": f"the model needs {needed / 1e9:,.1f} GB, more than is free"}
    started = time.perf_counter()
    with spinner(console, f"merging onto the {other} weights as well, to compare"):
        try:
            logits = reference.read_logits(cast(PreTrainedModel, merge_weights(tuned.adapted, other)))
            numbers: Certificate = asdict(reference.compare(logits))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            numbers = {"not_measured": "memory ran out"}
    release_memory()
    return {"onto": other, **numbers, "seconds": time.perf_counter() - started}


def save_merged(merged: PreTrainedModel, tuned: TunedModel, folder: Path, dtype: torch.dtype) -> None:
    """Save a model with tokenizer, chat template and the recipe's generation settings."""
    save_settings(merged, tuned, folder, dtype)
    with writing_weights(folder):
        merged.save_pretrained(folder, max_shard_size=SHARD_SIZE)


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


def _print_merge(certificate: Certificate, out: Path, console: Console) -> None:
    size = f"{certificate['weights_bytes'] / 1e6:,.0f} MB, {certificate['dtype']}"
    console.print(f"merged model: {out} ({size})", highlight=False)
    within = "within all limits of its certificate" if certificate["passed"] else "outside the limits"
    console.print(f"parity with the adapter is {within}", highlight=False)
    console.print(f"  {describe_parity(certificate['measured'])}", highlight=False)
    if other := certificate["other"]:
        numbers = f": not measured, because {other.get('not_measured')}"
        if "not_measured" not in other:
            numbers = f" it would be: {describe_distance(other)}"
            numbers += f" (measured in {other['seconds']:.0f} s)"
        console.print(f"merged onto the {other['onto']} weights instead{numbers}", highlight=False)
