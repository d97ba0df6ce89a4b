"""A model folder as it lies on disk: is everything there, whole, and safe to load; and what is its hash."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import EnvironmentProblem, LlmtuneError, Problem, RecipeError
from llmtune.store.atomic_files import list_model

if TYPE_CHECKING:
    from llmtune.recipe import ModelSection

_PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt", "model*.ckpt")
_LONGEST_HEADER_BYTES = 100_000_000  # the format's own limit


def check_folder(folder: Path, model: ModelSection) -> dict[str, Any]:
    """Check that `folder` holds a whole model that may be loaded, reading headers only; return its configuration.

    Raises:
        EnvironmentProblem: a file is missing, damaged or cut.
        RecipeError: the model wants its own code run, or has pickled weights only, and the recipe does not allow it.
    """
    config = read_config(folder)
    if not model.trust_remote_code:
        _refuse_remote_code(folder, config)
    _check_weights(folder, model.use_safetensors)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, or raise EnvironmentProblem that says what the folder is instead."""
    path = folder / "config.json"
    if not path.is_file():
        raise EnvironmentProblem(_describe_missing_config(folder))
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise EnvironmentProblem.of(
            "it names no model_type", str(path), "Get the file again from where the model comes from."
        )
    return config


def hash_model(folder: Path) -> str:
    """Return the sha256 over names and sha256 of all files that decide what the model computes.

    A file of the hub's cache that is named by its own sha256 is not read again.
    """
    total = hashlib.sha256()
    for name, found in list_model(folder).items():
        total.update(f"{name}\0{found}\n".encode())
    return total.hexdigest()


def _describe_missing_config(folder: Path) -> Problem:
    where = str(folder)
    if (folder / "adapter_config.json").is_file():
        fix = "Set model.name to the model it was made for, and adapter.start_from to this folder."
        return Problem("this folder holds an adapter, not a model", where, fix)
    if any(folder.glob("*.gguf")):
        fix = "Use the model's original folder or hub name: what is trained are unpacked weights."
        return Problem("this folder holds a GGUF file, not a Hugging Face model", where, fix)
    fix = "A model folder holds config.json, tokenizer files and *.safetensors."
    return Problem("there is no config.json in this folder", where, fix)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise EnvironmentProblem.of(f"cannot be read: {error.strerror}", str(path)) from None
    except ValueError as error:
        raise EnvironmentProblem.of(
            f"is not valid JSON: {error}",
            str(path),
            "The file is damaged: get it again from where the model comes from.",
        ) from None
    if not isinstance(content, dict):
        raise EnvironmentProblem.of(f"holds a {type(content).__name__} where an object is expected", str(path))
    return content


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    """Raise RecipeError if the model cannot be loaded without code of its own.

    A folder may name code for classes that transformers has itself by now, under the same names: those are taken.
    """
    tokenizer_path = folder / "tokenizer_config.json"
    tokenizer = _read_json(tokenizer_path) if tokenizer_path.is_file() else {}
    problems = [
        Problem(
            f"the model wants code from its own folder to be run: {wanted}",
            f"{folder / file}: auto_map",
            "Read that code, and set model.trust_remote_code: true if you trust it; or choose another model.",
        )
        for file, wanted in [
            ("config.json", _own_code(config.get("auto_map"))),
            ("tokenizer_config.json", _own_code(tokenizer.get("auto_map"))),
        ]
        if wanted
    ]
    RecipeError.collect(problems)


def _own_code(auto_map: object) -> str:
    """Return the classes of `auto_map` that transformers does not have itself, or an empty string."""
    import transformers

    named = auto_map.values() if isinstance(auto_map, dict) else [auto_map] if auto_map else []
    flat = [
        name for value in named for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)
    ]
    return ", ".join(name for name in flat if not hasattr(transformers, name.rpartition(".")[2]))


def _check_weights(folder: Path, use_safetensors: bool) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        EnvironmentProblem.collect(_check_shards(folder, index))
        return
    found = sorted(folder.glob("*.safetensors"))
    if found:
        EnvironmentProblem.collect(problem for path in found for problem in check_safetensors(path))
        return
    pickled = sorted({path.name for pattern in _PICKLED for path in folder.glob(pattern)})
    if not pickled:
        raise EnvironmentProblem.of(
            "there is no weight file (*.safetensors) in this folder",
            str(folder),
            "Get the model again from where it comes from.",
        )
    if use_safetensors:
        raise pickled_weights(pickled, str(folder))


def pickled_weights(files: list[str], where: str) -> LlmtuneError:
    """Say that the weights are pickled files alone, and which key allows them."""
    return RecipeError.of(
        f"the weights are pickled ({', '.join(files[:3])}), and a pickle can run any code when it is loaded",
        where,
        "Convert them to safetensors, or set model.use_safetensors: false if you trust where they come from.",
    )


def _check_shards(folder: Path, index: Path) -> Iterator[Problem]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        yield Problem("it has no weight_map", str(index), "Get the file again from where the model comes from.")
        return
    for name in sorted(set(map(str, weight_map.values()))):
        path = folder / name
        if path.is_file():
            yield from check_safetensors(path)
        else:
            fix = "The model is not complete: get this file from where the model comes from."
            yield Problem(f"is missing, and {index.name} names it", str(path), fix)


def check_safetensors(path: Path) -> Iterator[Problem]:
    """Compare the header of a safetensors file with its size (https://github.com/huggingface/safetensors#format)."""
    fix = "The file is damaged or its download was cut: get it again from where the model comes from."
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            yield Problem("is a Git LFS pointer, not the weights", str(path), "Run `git lfs pull` in that folder.")
            return
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_bytes <= min(_LONGEST_HEADER_BYTES, size - 8):
            yield Problem(f"is no safetensors file, or is cut: {size:,} bytes", str(path), fix)
            return
        header = file.read(header_bytes)
    try:
        tensors = json.loads(header)
        wanted = 8 + header_bytes + max(entry["data_offsets"][1] for name, entry in _tensors(tensors))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        yield Problem("has a header that cannot be read", str(path), fix)
        return
    if wanted != size:
        yield Problem(f"is cut: {size:,} bytes where its header wants {wanted:,}", str(path), fix)


def _tensors(header: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, entry) for name, entry in header.items() if name != "__metadata__"]
