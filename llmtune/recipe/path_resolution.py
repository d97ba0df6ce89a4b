"""Makes the paths in a recipe absolute: each is relative to the file that states it (`--set`: the working folder)."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from llmtune.recipe.eval_suites_section import OWN
from llmtune.recipe.schema import DataSection, EvaluateSection, Recipe, Source
from llmtune.recipe.source_map import Places
from llmtune.recipe.tuning_sections import ModelSection

TASK_FILES = (".yaml", ".yml")
"""Endings of a benchmark's task file."""
NAMED = ("hub:", "builtin:")
"""Beginnings of a place that is no path."""


def absolute(path: str, folder: Path, pattern: bool = False) -> str:
    """Return `path` seen from `folder`; `~` is the home folder. With `pattern`, the folder is no part of a glob."""
    path = os.path.expanduser(path)
    joined = os.path.join(folder, path)
    if pattern and glob.has_magic(path) and not os.path.lexists(joined) and not os.path.isabs(path):
        joined = os.path.join(glob.escape(str(folder)), path)
    normal = os.path.normpath(joined)
    return normal if os.path.realpath(normal) == os.path.realpath(joined) else joined  # a link before `..` stays


def is_local(name: str, folder: Path) -> bool:
    """Whether a model's name is a packaged model or a folder, rather than a name on the hub."""
    return name.startswith("builtin:") or is_folder(name, folder)


def is_folder(name: str, folder: Path) -> bool:
    """Whether a model's name is a path: it looks like one, or a folder of that name is there."""
    looks_local = name.startswith(("./", "../", "/", "~")) or name in (".", "..")
    return not name.startswith(NAMED) and (looks_local or os.path.isdir(os.path.join(folder, name)))


def model_place(name: str, folder: Path) -> str:
    """Make a model's name absolute if it is a folder; a name on the hub stays."""
    return absolute(name, folder) if is_folder(name, folder) else name


def make_absolute(recipe: Recipe, places: Places) -> Recipe:
    """Return the recipe with every path absolute."""
    adapter = recipe.adapter
    if adapter.start_from is not None:
        start_from = absolute(adapter.start_from, places.folder("adapter.start_from"))
        adapter = adapter.model_copy(update={"start_from": start_from})
    update = {"data": data_paths(recipe.data, places), "model": model_paths(recipe.model, places), "adapter": adapter}
    return recipe.model_copy(update={**update, "evaluate": evaluate_paths(recipe.evaluate, places)})


def evaluate_paths(evaluate: EvaluateSection, places: Places) -> EvaluateSection:
    """Make the files that studies read absolute; the name of a task of lm-eval stays."""
    update: dict[str, object] = {}
    for name, keys in (("forgetting", ("texts", "questions")), ("fairness", ("pairs", "swaps"))):
        section = getattr(evaluate, name)
        if section is not None:
            files = {key: study_files(getattr(section, key), f"evaluate.{name}.{key}", places) for key in keys}
            update[name] = section.model_copy(update=files)
    update["benchmarks"] = tuple(
        found.model_copy(update={"task": absolute(found.task, places.folder(f"evaluate.benchmarks.{i}.task"))})
        if found.task.endswith(TASK_FILES)
        else found
        for i, found in enumerate(evaluate.benchmarks)
    )
    return evaluate.model_copy(update=update)


def study_files(named: tuple[str, ...], key: str, places: Places) -> tuple[str, ...]:
    """Make files absolute; `own` and names on the hub stay."""
    return tuple(
        name if name == OWN or name.startswith(NAMED) else absolute(name, places.folder(f"{key}.{i}"))
        for i, name in enumerate(named)
    )


def data_paths(data: DataSection, places: Places) -> DataSection:
    """Make the paths of all sources absolute."""
    update: dict[str, tuple[Source, ...]] = {}
    for side in ("train", "validation", "test"):
        sources = getattr(data, side)
        if isinstance(sources, tuple):
            update[side] = tuple(
                source.model_copy(update={"path": source_place(source.path, places.folder(f"data.{side}.{i}.path"))})
                for i, source in enumerate(sources)
            )
    return data.model_copy(update=update)


def source_place(path: str, folder: Path) -> str:
    """Make a source's path absolute unless it is `hub:NAME` or `builtin:NAME`."""
    return path if path.startswith(NAMED) else absolute(path, folder, pattern=True)


def model_paths(model: ModelSection, places: Places) -> ModelSection:
    """Make the model's name, or those of its candidates, and its chat template absolute."""
    update: dict[str, object] = {}
    if model.name is not None:
        update["name"] = model_place(model.name, places.folder("model.name"))
    if model.candidates is not None:
        update["candidates"] = tuple(
            model_place(name, places.folder(f"model.candidates.{i}")) for i, name in enumerate(model.candidates)
        )
    if model.chat_template is not None:
        update["chat_template"] = absolute(model.chat_template, places.folder("model.chat_template"))
    return model.model_copy(update=update)
