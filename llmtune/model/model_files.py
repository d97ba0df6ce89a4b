"""A model folder on disk: complete, undamaged, and safe to load."""

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
"""Vocabularies above it are left to the library that reads them."""
MAX_JSON_DEPTH = 32
_PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt", "model*.ckpt")


def check_model_folder(folder: Path, model: ModelSection) -> None:
    """Check that `folder` holds a complete model that may be loaded, reading headers only.

    Raises:
        EnvironmentProblem: a file is missing, damaged or cut.
        RecipeError: the model wants its own code run, or has pickled weights only, and the recipe does not allow it.
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
            "there is no weight file (*.safetensors) in this folder",
            str(folder),
            "Get the model again from where it comes from.",
        )


def read_config_file(folder: Path) -> dict[str, object]:
    """Read `config.json`; raises EnvironmentProblem that says what the folder is instead, or what is wrong with it."""
    path = folder / "config.json"
    if not path.is_file():
        raise EnvironmentProblem(_describe_missing_config(folder))
    config = read_json_object(path)
    fix = "Get the file again from where the model comes from."
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise EnvironmentProblem.of("it names no model_type", str(path), fix)
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise EnvironmentProblem.of(f"architectures is {named!r}, and must be a list of names", str(path), fix)
    if config.get("quantization_config") is not None:
        EnvironmentProblem.collect(find_unreadable(config["quantization_config"], str(path)))
    return config


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


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON file of a model or an adapter; raises EnvironmentProblem where it is damaged or no object."""
    content = _parse_json_file(path)
    if isinstance(content, Problem):
        raise EnvironmentProblem(content)
    if not isinstance(content, dict):
        raise EnvironmentProblem.of(f"holds a {type(content).__name__} where an object is expected", str(path))
    return content


def _parse_json_file(path: Path) -> object:
    """Return what a JSON file holds, or what is wrong with the file."""
    try:
        content: object = json.loads(read_text_file(path, MAX_JSON_BYTES))
    except OSError as error:
        return Problem(f"cannot be read: {error.strerror}", str(path), "Get it again from where the model comes from.")
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        fix = "The file is damaged: get it again from where the model comes from."
        return Problem(f"is not valid JSON: {what}", str(path), fix)
    if _depth(content) > MAX_JSON_DEPTH:
        return Problem(f"is nested more than {MAX_JSON_DEPTH} deep", str(path), "No file of a model is.")
    return content


def _depth(content: object) -> int:
    """Count how deep lists and objects lie within one another; stops after MAX_JSON_DEPTH."""
    level, depth = [content], 0
    while level and depth <= MAX_JSON_DEPTH:
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
        depth += bool(inner)
    return depth


def _check_entries(folder: Path) -> Iterator[Problem]:
    """Yield files of a folder that a read could wait for, and JSON that no library reads."""
    for path in sorted(path for path in folder.iterdir() if path.suffix in MODEL_ENDINGS and not path.is_dir()):
        try:
            size = check_regular(path).st_size
        except OSError as error:
            yield Problem(f"cannot be read: {error.strerror}", str(path), "Remove it, or get it again.")
            continue
        if (
            path.suffix == ".json"
            and 0 < size <= SMALL_JSON_BYTES
            and isinstance(wrong := _parse_json_file(path), Problem)
        ):
            yield wrong


def _refuse_remote_code(folder: Path, config: dict[str, object]) -> None:
    """Raise RecipeError if the model cannot be loaded without code of its own.

    A folder may name code for classes that transformers has itself by now, under the same names: those are taken.
    """
    path = folder / "tokenizer_config.json"
    tokenizer = read_json_object(path) if path.is_file() else {}
    RecipeError.collect(
        Problem(
            f"the model wants code from its own folder to be run: {code}",
            f"{folder / file}: auto_map",
            "Read that code, and set model.trust_remote_code: true if you trust it; or choose another model.",
        )
        for file, content in (("config.json", config), ("tokenizer_config.json", tokenizer))
        if (code := ", ".join(_own_classes(content.get("auto_map"))))
    )


def _own_classes(auto_map: object) -> Iterator[str]:
    """Yield the classes that `auto_map` names, in values and lists, and that transformers does not have itself."""
    if isinstance(auto_map, str):
        if not hasattr(transformers, auto_map.rpartition(".")[2]):
            yield auto_map
    elif isinstance(auto_map, dict | list):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _own_classes(value)


def pickled_weights(files: list[str], where: str) -> LlmtuneError:
    """Return the error for weights that are pickled files alone; it names the key that allows them."""
    return RecipeError.of(
        f"the weights are pickled ({', '.join(files[:3])}), and a pickle can run any code when it is loaded",
        where,
        "Convert them to safetensors, or set model.use_safetensors: false if you trust where they come from.",
    )


def _check_shards(folder: Path, index: Path) -> Iterator[Problem]:
    weight_map = read_json_object(index).get("weight_map")
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
    """Yield what is wrong with a safetensors file, by its header and its size."""
    fix = "The file is damaged or its download was cut: get it again from where the model comes from."
    try:
        size = check_regular(path).st_size
        with open_regular(path) as file:
            if file.read(8) == b"version ":
                yield Problem("is a Git LFS pointer, not the weights", str(path), "Run `git lfs pull` in that folder.")
                return
        with safe_open(str(path), "np"):
            pass
    except MemoryError:  # the library maps the file; without room for that, loading it says so
        return
    except OSError as error:
        yield Problem(f"cannot be read: {error.strerror or error}", str(path), fix)
    except SafetensorError as error:
        reason = first_line(error).removeprefix("Error while deserializing header: ")
        yield Problem(f"is damaged or is cut at {size:,} bytes: {reason}", str(path), fix)


def share_file(path: Path, like: Path) -> None:
    """Give `path` the permissions of `like`: safetensors writes files that their owner alone can read."""
    path.chmod(like.stat().st_mode)
