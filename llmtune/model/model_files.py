"""Check a model folder on disk: complete, undamaged, and safe to load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import transformers
from safetensors import SafetensorError, safe_open

from llmtune.errors import EnvironmentProblem, LlmtuneError, Problem, RecipeError, first_line
from llmtune.model.quantized_base import find_unreadable
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.user_files import check_regular, open_regular, read_text_file
from llmtune.store.atomic_files import MODEL_ENDINGS

MAX_JSON_BYTES = 2**28
SMALL_JSON_BYTES = 2**22
"""Larger vocabularies are left to the library that reads them."""
MAX_JSON_DEPTH = 32
_PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt", "model*.ckpt")


def check_model_folder(folder: Path, model: ModelSection) -> None:
    """Check that `folder` has a complete model that may be loaded, reading headers only.

    Raises:
        EnvironmentProblem: a file is missing, damaged or truncated.
        RecipeError: the model needs its own code, or has only pickled weights, and the recipe does not allow that.
    """
    EnvironmentProblem.collect(_check_entries(folder))
    config = read_config_file(folder)
    if not model.trust_remote_code:
        _refuse_remote_code(folder, config)
    index = folder / "model.safetensors.index.json"
    weights = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        EnvironmentProblem.collect(_check_shards(folder, index))
    elif weights:
        EnvironmentProblem.collect(problem for path in weights for problem in check_safetensors(path))
    elif pickled := sorted({path.name for pattern in _PICKLED for path in folder.glob(pattern)}):
        if model.use_safetensors:
            raise pickled_weights(pickled, str(folder))
    else:
        raise EnvironmentProblem.of(
            "no weight file (*.safetensors) in this folder",
            str(folder),
            "Download the model again.",
        )


def read_config_file(folder: Path) -> dict[str, object]:
    """Read `config.json`; raises EnvironmentProblem that names the problem, or what the folder is instead."""
    path = folder / "config.json"
    if not path.is_file():
        raise EnvironmentProblem(_describe_missing_config(folder))
    config = read_json_object(path)
    fix = "Download the file again."
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise EnvironmentProblem.of("model_type is missing", str(path), fix)
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise EnvironmentProblem.of(f"architectures is {named!r}, but must be a list of names", str(path), fix)
    if config.get("quantization_config") is not None:
        EnvironmentProblem.collect(find_unreadable(config["quantization_config"], str(path)))
    return config


def _describe_missing_config(folder: Path) -> Problem:
    where = str(folder)
    if (folder / "adapter_config.json").is_file():
        fix = "Set model.name to the model it was made for, and adapter.start_from to this folder."
        return Problem("this folder contains an adapter, not a model", where, fix)
    if any(folder.glob("*.gguf")):
        fix = "Use the model's original folder or hub name: training needs unpacked weights."
        return Problem("this folder contains a GGUF file, not a Hugging Face model", where, fix)
    fix = "A model folder has config.json, tokenizer files and *.safetensors."
    return Problem("no config.json in this folder", where, fix)


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON file of a model or adapter; raises EnvironmentProblem if it is damaged or not an object."""
    content = _parse_json_file(path)
    if isinstance(content, Problem):
        raise EnvironmentProblem(content)
    if not isinstance(content, dict):
        raise EnvironmentProblem.of(f"contains a {type(content).__name__}, but an object is expected", str(path))
    return content


def _parse_json_file(path: Path) -> object:
    """Return the content of a JSON file, or the problem with it."""
    try:
        content: object = json.loads(read_text_file(path, MAX_JSON_BYTES))
    except OSError as error:
        return Problem(f"cannot be read: {error.strerror}", str(path), "Download the file again.")
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        fix = "The file is damaged: download it again."
        return Problem(f"is not valid JSON: {what}", str(path), fix)
    if _depth(content) > MAX_JSON_DEPTH:
        return Problem(f"is nested more than {MAX_JSON_DEPTH} deep", str(path), "Download the file again.")
    return content


def _depth(content: object) -> int:
    """Return the nesting depth of lists and objects; stops after MAX_JSON_DEPTH."""
    level, depth = [content], 0
    while level and depth <= MAX_JSON_DEPTH:
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
        depth += bool(inner)
    return depth


def _check_entries(folder: Path) -> Iterator[Problem]:
    """Yield files that could block a read, and JSON that no library reads."""
    for path in sorted(path for path in folder.iterdir() if path.suffix in MODEL_ENDINGS and not path.is_dir()):
        try:
            size = check_regular(path).st_size
        except OSError as error:
            yield Problem(f"cannot be read: {error.strerror}", str(path), "Remove it, or download it again.")
            continue
        if (
            path.suffix == ".json"
            and 0 < size <= SMALL_JSON_BYTES
            and isinstance(wrong := _parse_json_file(path), Problem)
        ):
            yield wrong


def _refuse_remote_code(folder: Path, config: dict[str, object]) -> None:
    """Raise RecipeError if the model cannot be loaded without its own code.

    A folder may name code for classes that transformers now has under the same names: those are used instead.
    """
    path = folder / "tokenizer_config.json"
    tokenizer = read_json_object(path) if path.is_file() else {}
    RecipeError.collect(
        Problem(
            f"the model needs code from its own folder: {code}",
            f"{folder / file}: auto_map",
            "Read that code, and set model.trust_remote_code: true if you trust it, or choose another model.",
        )
        for file, content in (("config.json", config), ("tokenizer_config.json", tokenizer))
        if (code := ", ".join(_own_classes(content.get("auto_map"))))
    )


def _own_classes(auto_map: object) -> Iterator[str]:
    """Yield the classes in `auto_map`, in values and lists, that transformers does not have."""
    if isinstance(auto_map, str):
        if not hasattr(transformers, auto_map.rpartition(".")[2]):
            yield auto_map
    elif isinstance(auto_map, dict | list):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _own_classes(value)


def pickled_weights(files: list[str], where: str) -> LlmtuneError:
    """Return the error for weights that are only in pickled files; it names the key that allows them."""
    return RecipeError.of(
        f"the weights are pickled ({', '.join(files[:3])}), and loading a pickle can run any code",
        where,
        "Convert them to safetensors, or set model.use_safetensors: false if you trust their source.",
    )


def _check_shards(folder: Path, index: Path) -> Iterator[Problem]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        yield Problem("weight_map is missing", str(index), "Download the file again.")
        return
    for name in sorted(set(map(str, weight_map.values()))):
        path = folder / name
        if path.is_file():
            yield from check_safetensors(path)
        else:
            fix = "The model is incomplete: download this file."
            yield Problem(f"is missing, but {index.name} names it", str(path), fix)


def check_safetensors(path: Path) -> Iterator[Problem]:
    """Yield the problems of a safetensors file, from its header and size."""
    fix = "The file is damaged or its download was interrupted: download it again."
    try:
        size = check_regular(path).st_size
        with open_regular(path) as file:
            if file.read(8) == b"version ":
                yield Problem("is a Git LFS pointer, not the weights", str(path), "Run `git lfs pull` in that folder.")
                return
        with safe_open(str(path), "np"):
            pass
    except MemoryError:  # the library maps the file; if that fails, loading reports it
        return
    except OSError as error:
        yield Problem(f"cannot be read: {error.strerror or error}", str(path), fix)
    except SafetensorError as error:
        reason = first_line(error).removeprefix("Error while deserializing header: ")
        yield Problem(f"is damaged or truncated at {size:,} bytes: {reason}", str(path), fix)


def share_file(path: Path, like: Path) -> None:
    """Give `path` the permissions of `like`: safetensors writes files that only their owner can read."""
    path.chmod(like.stat().st_mode)
