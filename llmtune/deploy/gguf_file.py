"""Weights into a GGUF file, one at a time, in the number format that is asked for."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterable
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
    size_label,
)
from gguf.quants import quantize
from rich.progress import Progress
from transformers import PreTrainedModel

from llmtune.deploy.gguf_tensors import GgufLayout, list_tensors, write_shape
from llmtune.deploy.gguf_vocabulary import NAMES, Vocabulary, write_vocabulary
from llmtune.errors import EnvironmentProblem

QUANTIZER = "llama-quantize"
LARGEST_F16 = float(np.finfo(np.float16).max)
FORMATS = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
"""Number formats of weights, as a file is marked."""
K_QUANTS = ("q4_k_m",)
"""Formats that llama.cpp's own program makes, from a file in F32."""
Tensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Names and weights, made anew at each call: once for their shapes, once to be written one at a time."""


def write_model(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    file: Path,
    number_format: str,
    name: str,
    bars: Progress | None = None,
) -> None:
    """Write a whole model; vectors and norms stay in float32, as llama.cpp expects. `bars` show how far it is.

    Raises:
        EnvironmentProblem: its type is not known, a weight is too large for F16, or a program to quantise is missing.
    """
    if number_format in K_QUANTS:
        whole = file.with_name(f"{file.name}.whole")
        write_model(model, vocabulary, whole, "f32", name, bars)
        _quantize_file(whole, file, FORMATS[number_format])
        whole.unlink()
        return
    layout = GgufLayout(model.config)
    writer = GGUFWriter(file, layout.architecture.name)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    parameters = sum(weight.numel() for weight in model.parameters())
    writer.add_size_label(size_label(parameters, parameters, 0, 0))
    writer.add_file_type(FORMATS[number_format])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_shape(writer, layout, len(vocabulary[NAMES.LIST]))
    write_vocabulary(writer, vocabulary)
    write_tensors(writer, lambda: list_tensors(model, layout), number_format, bars)


def write_tensors(writer: GGUFWriter, tensors: Tensors, number_format: str, bars: Progress | None = None) -> None:
    """Write all `tensors` and close the file."""
    kinds = {}
    for name, weight in tensors():
        kinds[name] = kind = _tensor_type(name, weight.shape, GGMLQuantizationType[number_format.upper()])
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = weight.numel() // block * block_bytes
        writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = bars.track(tensors(), len(kinds), description="writing tensors") if bars else tensors()
        for name, weight in written:
            writer.write_tensor_data(_encode(name, weight, kinds[name]))
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


def _quantize_file(whole: Path, file: Path, file_type: LlamaFileType) -> None:
    quantizer = find_quantizer()
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
