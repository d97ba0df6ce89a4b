"""Weights into a GGUF file, one at a time, in the number format that is asked for."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    quant_shape_to_byte_shape,
    size_label,
)
from gguf.quants import quantize
from transformers import PreTrainedModel

from llmtune.deploy.gguf_tensors import find_architecture, list_tensors, write_shape
from llmtune.deploy.gguf_vocabulary import Vocabulary, write_vocabulary
from llmtune.errors import EnvironmentProblem

QUANTIZER = "llama-quantize"
LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Format:
    """A number format of weights: as the file is marked, and as matrices are stored."""

    file_type: LlamaFileType
    tensor_type: GGMLQuantizationType
    quantized_from: str | None = None
    """For formats that llama.cpp's own program makes: the format of the file that it starts from."""


FORMATS = {
    "f32": Format(LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "f16": Format(LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "bf16": Format(LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
    "q8_0": Format(LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
    "q4_k_m": Format(LlamaFileType.MOSTLY_Q4_K_M, GGMLQuantizationType.Q4_K, quantized_from="f32"),
}


def write_model(model: PreTrainedModel, vocabulary: Vocabulary, file: Path, number_format: str, name: str) -> None:
    """Write a whole model; vectors and norms stay in float32, as llama.cpp expects.

    Raises:
        EnvironmentProblem: its type is not known, a weight is too large for F16, or a program to quantise is missing.
    """
    target = FORMATS[number_format]
    if target.quantized_from is not None:
        quantizer = find_quantizer()
        whole = file.with_name(f"{file.name}.whole")
        write_model(model, vocabulary, whole, target.quantized_from, name)
        _quantize_file(quantizer, whole, file, target.file_type)
        whole.unlink()
        return
    architecture = find_architecture(model.config)
    writer = GGUFWriter(file, architecture.name)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    parameters = sum(weight.numel() for weight in model.parameters())
    writer.add_size_label(size_label(parameters, parameters, 0, 0))
    writer.add_file_type(target.file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_shape(writer, model.config, architecture, len(vocabulary.tokens))
    write_vocabulary(writer, vocabulary)
    write_tensors(writer, lambda: list_tensors(model, architecture), target.tensor_type)


Tensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Names and weights, made anew at each call: once for their shapes, once to be written one at a time."""


def write_tensors(writer: GGUFWriter, tensors: Tensors, target: GGMLQuantizationType) -> None:
    """Write all `tensors` and close the file."""
    stored = {}
    for name, weight in tensors():
        stored[name] = kind = _tensor_type(name, weight.shape, target)
        shape = tuple(weight.shape)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
        if plain is None:
            shape = quant_shape_to_byte_shape(shape, kind)
        dtype = np.dtype(plain or np.uint8)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in tensors():
            writer.write_tensor_data(_encode(name, weight, stored[name]))
    finally:
        writer.close()


def _tensor_type(name: str, shape: torch.Size, target: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return how one weight is stored: rows that do not divide into blocks stay in F16."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[target]
    return target if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _encode(name: str, weight: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    values = weight.contiguous().numpy()
    if kind == GGMLQuantizationType.F16 and (largest := float(np.abs(values).max())) > LARGEST_F16:
        what = f"the weight {name} has a value of {largest:.3g}, and F16 ends at {LARGEST_F16:.0f}"
        raise EnvironmentProblem.of(what, "--type", "Use: --type bf16.")
    return quantize(values, kind)


def has_llama() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def find_quantizer() -> str:
    """Return what makes K-quants here: the path of llama-quantize, or `llama_cpp` for the Python package.

    Raises EnvironmentProblem where there is none.
    """
    if program := shutil.which(QUANTIZER):
        return program
    if has_llama():
        return "llama_cpp"
    fix = f"Run: pip install llama-cpp-python, or put llama.cpp's {QUANTIZER} on PATH; or use --type q8_0."
    raise EnvironmentProblem.of("nothing is installed that makes files of type q4_k_m", "--type", fix)


def _quantize_file(quantizer: str, whole: Path, file: Path, file_type: LlamaFileType) -> None:
    if quantizer == "llama_cpp":
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = int(file_type)
        settings.nthread = torch.get_num_threads()
        code = llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), settings)
        reason = f"code {code}"
    else:
        kind = file_type.name.removeprefix("MOSTLY_")
        done = subprocess.run(  # noqa: S603 - the program was looked up by its name
            [quantizer, str(whole), str(file), kind], capture_output=True, text=True, errors="replace", check=False
        )
        code, reason = done.returncode, (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
    if code:
        raise EnvironmentProblem.of(f"llama.cpp could not quantise the model: {reason}", str(file), "Use: --type q8_0.")
