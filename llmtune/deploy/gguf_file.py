"""A whole model as a GGUF file: saved, converted by llama.cpp's converter, quantised by llama.cpp."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gguf import LlamaFileType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.saving import writing_weights
from llmtune.deploy.gguf_converter import FORMATS, converter_errors, make_converter
from llmtune.deploy.gguf_vocabulary import Vocabulary
from llmtune.errors import EnvironmentProblem

LARGEST_F16 = float(np.finfo(np.float16).max)
K_QUANTS = ("q4_k_m",)
"""Formats that llama.cpp itself makes, from a file in F32."""


def write_model(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    file: Path,
    number_format: str,
    name: str,
    *,
    progress: bool = False,
) -> None:
    """Write a whole model, with `vocabulary` as its tokenizer; vectors and norms stay in float32.

    `progress` shows a bar. The model is saved next to `file` first and removed afterwards, so it takes its own size on
    disk for that time.

    Raises:
        EnvironmentProblem: the converter cannot write the model, a weight is too large for F16, or nothing is installed
            that quantises.
    """
    if number_format in K_QUANTS:
        whole = file.with_name(f"{file.name}.whole")
        write_model(model, processor, vocabulary, whole, "f32", name, progress=progress)
        _quantize_file(whole, file, FORMATS[number_format])
        whole.unlink()
        return
    if number_format == "f16":
        _check_range(model)
    with TemporaryDirectory(dir=file.parent) as place, converter_errors():
        with writing_weights(file.parent):
            model.save_pretrained(place)
            processor.save_pretrained(place)  # some converters count its tokens
        converter = make_converter(model.config, Path(place), file, number_format, name, vocabulary)
        converter.prepare_tensors()
        converter.prepare_metadata(vocab_only=False)
        writer = converter.gguf_writer
        try:
            writer.write_header_to_file(path=file)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file(progress=progress)
        finally:
            writer.close()


def _check_range(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        largest = float(weight.detach().abs().max())
        if weight.dim() > 1 and largest > LARGEST_F16:
            what = f"the weight {name} has a value of {largest:.3g}, and F16 ends at {LARGEST_F16:.0f}"
            raise EnvironmentProblem.of(what, "--type", "Use: --type bf16.")


def has_llama() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def check_quantizer() -> None:
    """Raise EnvironmentProblem where nothing is installed that makes K-quants."""
    if not has_llama():
        fix = "Run: pip install llama-cpp-python; or use --type q8_0."
        raise EnvironmentProblem.of("nothing is installed that makes files of type q4_k_m", "--type", fix)


def _quantize_file(whole: Path, file: Path, file_type: LlamaFileType) -> None:
    check_quantizer()
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(file_type)
    settings.nthread = torch.get_num_threads()
    if code := llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), settings):
        what = f"llama.cpp could not quantise the model: code {code}"
        raise EnvironmentProblem.of(what, str(file), "Use: --type q8_0.")
