"""A tuned model or its LoRA adapter as a GGUF file with an Ollama Modelfile, certified against the tuned model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from transformers import PretrainedConfig, PreTrainedModel

from llmtune.adapter.merging import check_mergeable
from llmtune.adapter.merging import merge_adapter as merge_weights
from llmtune.deploy.export import ExportFormat, WrittenExport
from llmtune.deploy.exported_model import ExportedModel, ModelSource, check_pictures
from llmtune.deploy.gguf_converter import (
    FORMATS,
    K_QUANTS,
    TensorLayout,
    check_convertible,
    check_quantizer,
    find_ignored_window,
    has_llama,
    write_model,
    write_projector,
)
from llmtune.deploy.gguf_readers import FORMAT_LIMITS, PROJECTOR, check_reader, longest_text, open_gguf_export
from llmtune.deploy.gguf_tokenizer import (
    MERGE_INSTEAD,
    NAMES,
    TokenizerFacts,
    describe_tokenizer,
    find_pre_tokenizer,
)
from llmtune.deploy.ollama_modelfile import MODELFILE, write_modelfile
from llmtune.deploy.parity import LIMITS, Certificate, Onto, check_onto, describe_parity
from llmtune.deploy.parity_reference import TextReference, TunedReference
from llmtune.deploy.tuned_model import TunedModel, training_base
from llmtune.display.console import spinner
from llmtune.errors import EnvironmentProblem, GateFailed, Problem, RecipeError, nearest
from llmtune.evaluate.generation import answer_ends
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import read_model_config
from llmtune.model.towers import take_text
from llmtune.store.atomic_files import hash_file

DEFAULT_FORMAT = "f16"
BASE_FILE = "base.gguf"
ADAPTER_FORMATS = ("f32", "f16")
ROUNDING = {"f32": 1e-5, "f16": 2e-3}
"""Maximum relative error of a product in the file: two roundings of 2^-11 in F16."""
_FIX = "Omit --adapter-only to write the complete model."


def gguf_format(
    number_format: str = DEFAULT_FORMAT, *, onto: str | None = None, adapter_only: bool = False
) -> ExportFormat:
    """Return the format of GGUF files in a number format: of complete models, or of LoRA adapters."""
    check = partial(check_gguf, number_format=number_format, onto=onto, adapter_only=adapter_only)
    if adapter_only:
        return ExportFormat(
            f"gguf/adapter-{number_format}",
            "the GGUF file",
            check=check,
            prepare=lambda tuned: check_lora_only(tuned.model),
            write=partial(write_gguf_adapter, number_format=number_format),
            open=_open_on_base,
            describe=_describe_gguf,
            scored=False,
        )
    return ExportFormat(
        f"gguf/{number_format}",
        "the GGUF file",
        check=check,
        prepare=_prepare_gguf,
        write=partial(write_gguf, number_format=number_format, onto=onto),
        open=_open_gguf,
        describe=_describe_gguf,
    )


def check_gguf(
    source: ModelSource, number_format: str = DEFAULT_FORMAT, onto: str | None = None, adapter_only: bool = False
) -> None:
    """Check without loading weights that a model can be written.

    Raises:
        RecipeError: an invalid option, or the model neither continues a text nor classifies it.
        EnvironmentProblem: GGUF files cannot store the model or its tokenizer, or the quantiser is not installed.
    """
    formats = ADAPTER_FORMATS if adapter_only else tuple(FORMATS)
    if number_format not in formats:
        file = "an adapter" if adapter_only else "a GGUF file"
        what = f"{number_format!r} is not a number format of {file}.{nearest(number_format, formats)}"
        raise RecipeError.of(what, "--type", f"Choose one of: {', '.join(formats)}.")
    if number_format in K_QUANTS:
        check_quantizer()
    task, recipe = source.task, source.recipe
    fix = "Merge it, then run llama.cpp's convert_hf_to_gguf.py on the folder, and again with --mmproj."
    check_pictures(source, "deploy", fix)
    if onto is not None and (adapter_only or training_base(recipe, source.model_ref) == "original"):
        what = "an adapter without its base ignores it" if adapter_only else "the base was not quantised in training"
        raise RecipeError.of(what, "--onto", "Omit --onto.")
    if onto is not None:
        RecipeError.collect(check_onto(onto, True, recipe.adapter.method == "qlora"))
    if not adapter_only:
        check_mergeable(recipe.adapter.method, recipe.adapter.options)
    kind = task.model_kind
    encoder = not kind.decodes and kind.in_gguf and task.required_inputs == ("prompt",)
    if not kind.decodes and not encoder:
        what = f"GGUF export supports models that continue or classify a text, not this one of task {task.name}"
        raise RecipeError.of(what, "deploy", "Use the adapter, or the merged model of `llmtune deploy merge`.")
    config = read_model_config(source.model_ref, recipe.model)
    check_convertible(config, kind)
    check_reader(config.get_text_config().model_type, find_pre_tokenizer(source.processor, encoder))


def _prepare_gguf(tuned: TunedModel) -> None:
    """Refuse pairs of texts, and let the model compute in float32: its sums are rounded only to the target format."""
    second_texts = (tuned.task.stated_inputs(row, tuned.recipe).get("pair") for row in tuned.rows)
    if not tuned.task.model_kind.decodes and any(second_texts):
        raise RecipeError.of("llama.cpp's classifiers read one text, these rows have pairs", "data.test", MERGE_INSTEAD)
    if not tuned.adapted.selected.quantized:
        tuned.model.float()


def _describe_tokens(reference: TunedReference) -> tuple[TokenizerFacts | None, list[int]]:
    """Return the tokenizer's fields and the ids that end an answer; None and none of a classifier."""
    tuned = reference.tuned
    if not isinstance(reference, TextReference):
        return None, []
    stops = answer_ends(tuned.model, tuned.processor, tuned.recipe)
    return describe_tokenizer(tuned.processor, reference.prompts, stops), stops


def write_gguf(reference: TunedReference, folder: Path, number_format: str, onto: str | None) -> WrittenExport:
    """Merge, and write `<name>-<FORMAT>.gguf` with a Modelfile."""
    tuned, name = reference.tuned, _file_name(reference.tuned)
    tokenizer, stops = _describe_tokens(reference)
    base = cast(Onto, onto or training_base(tuned.recipe, tuned.model_ref))
    file = folder / f"{name}-{number_format.upper()}.gguf"
    with spinner(tuned.console, "merging"):
        merged = merge_weights(tuned.adapted, base)
    window = find_ignored_window(merged.config.get_text_config().to_dict())
    shown = tuned.console.is_terminal and not tuned.console.quiet
    write_model(take_text(merged), tuned.processor, tokenizer, file, number_format, name, progress=shown)
    limits = FORMAT_LIMITS[number_format]
    if tuned.adapted.selected.quantized:
        limits = limits.wider(LIMITS["rounded" if base == "dequantized" else "other base"])
    written = tokenizer and write_modelfile(file, tuned, stops, (), adds_bos=tokenizer[NAMES.ADD_BOS], adapter=False)
    facts = {**_file_facts(tuned, file, number_format), "onto": base, "modelfile": written, "ignored_window": window}
    if (checkpoint := reference.checkpoint) is not None:
        facts["projector"] = _write_towers(checkpoint.folder, merged.config, folder / f"{PROJECTOR}{name}-F16.gguf")
    return WrittenExport(facts, limits, "" if number_format in ADAPTER_FORMATS else "Round less: --type f16. ")


def _write_towers(base: Path, config: PretrainedConfig, file: Path) -> Certificate:
    """Write the base's towers, and return the file's name and hash, or why the converter cannot write them."""
    try:
        write_projector(base, config, file, file.stem)
    except EnvironmentProblem as error:
        file.unlink(missing_ok=True)
        return {"not_written": error.problems[0].what}
    return {"file": file.name, "tensors": len(GGUFReader(file).tensors), "file_sha256": hash_file(file)}


def write_gguf_adapter(reference: TunedReference, folder: Path, number_format: str) -> WrittenExport:
    """Write the adapter, and its base in float32 if llama.cpp can read both back, which it cannot in 4 bits."""
    tuned, name = reference.tuned, _file_name(reference.tuned)
    tokenizer, stops = _describe_tokens(reference)
    assert tokenizer is not None, "classifiers have no file of an adapter alone"
    model, selected = cast(PeftModel, tuned.model), tuned.adapted.selected
    file = folder / f"{name}-lora-{number_format.upper()}.gguf"
    with spinner(tuned.console, "writing the adapter"):
        write_adapter(model, file, number_format, name)
        compared = compare_adapter(model, file, number_format)
    notes = [f"An adapter. Put its base next to it as {BASE_FILE}: {selected.model_ref.name}"]
    written = write_modelfile(file, tuned, stops, notes, adds_bos=tokenizer[NAMES.ADD_BOS], adapter=True)
    facts = {**_file_facts(tuned, file, number_format), "onto": "none", "adapter": compared, "modelfile": written}
    if not has_llama() or selected.quantized:
        return WrittenExport(facts)
    base = folder / BASE_FILE
    write_model(take_text(cast(PreTrainedModel, model.unload())), tuned.processor, tokenizer, base, "f32", name)
    return WrittenExport(facts, temporary=base)


def _file_name(tuned: TunedModel) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", tuned.recipe.name)


def _file_facts(tuned: TunedModel, file: Path, number_format: str) -> Certificate:
    return {
        "method": tuned.adapted.method,
        "file": file.name,
        "file_bytes": file.stat().st_size,
        "file_sha256": hash_file(file),
        "number_format": number_format,
        "adapter": None,
    }


def _open_gguf(folder: Path, reference: TunedReference) -> ExportedModel:
    return open_gguf_export(folder, reference.tuned, max(reference.longest, longest_text(reference.tuned)))


def _open_on_base(folder: Path, reference: TunedReference) -> ExportedModel | None:
    """Open the adapter's file on that of its base; None without one."""
    base = folder / BASE_FILE
    adapter = next(folder.glob("*-lora-*.gguf"))
    return open_gguf_export(base, reference.tuned, reference.longest, adapter) if base.is_file() else None


def _describe_gguf(certificate: Certificate, out: Path) -> list[str]:
    size = f"{certificate['file_bytes'] / 1e6:,.1f} MB, {certificate['number_format'].upper()}"
    lines = [f"GGUF: {out / certificate['file']} ({size})"]
    if compared := certificate["adapter"]:
        largest = f"largest difference {compared['largest_difference']:.2g} of its size"
        lines.append(f"adapter, read back: {compared['modules']} modules, {largest}")
    if measured := certificate["measured"]:
        parity = describe_parity(measured)
        lines.append(f"parity with the tuned model, read by {certificate['reader']}, {parity}")
    if window := certificate.get("ignored_window"):
        lines.append(f"context: {window:,} tokens, the model's sliding window, which llama.cpp ignores")
    if projector := certificate.get("projector"):
        written = f"{out / projector['file']} (the base's)" if "file" in projector else projector["not_written"]
        lines.append(f"towers: {written}")
    if certificate["modelfile"] is False:
        lines.append("No Modelfile: Ollama's templates cannot express this chat template. Use llama-server.")
    elif certificate["modelfile"]:
        lines.append(f"Ollama: ollama create NAME -f {out / MODELFILE}")
    return lines


# The adapter


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
    for module, layer in take_text(cast(PreTrainedModel, unwrap(model))).named_modules():
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
