"""Finds recipes: files by path, shipped recipes by name, starter recipes by task."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.data_section import DATA_ENDINGS, data_ending
from llmtune.recipe.layers import read_layers
from llmtune.recipe.source_map import SourceMap
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.yaml_reader import file_label


@dataclass(frozen=True)
class Shipped:
    """A recipe that ships with llmtune."""

    name: str
    task: str
    description: str
    """The first comment line of the file."""
    file: Path


def recipes_folder() -> Path:
    """Return the folder of shipped recipes: in the package when installed, next to it in a checkout."""
    package = Path(str(resources.files("llmtune")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_files(folder: Path) -> dict[str, Path]:
    """Return the recipe files in a folder by name."""
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def list_recipes() -> list[Shipped]:
    """List the shipped recipes, by name."""
    recipes: list[Shipped] = []
    for name, file in shipped_files(recipes_folder()).items():
        task = SourceMap(read_layers(file)).find(["task"])[0].value
        recipes.append(Shipped(name, str(task), describe_file(file), file))
    return recipes


def describe_file(file: Path) -> str:
    """Return the first comment line, ignoring editor directives."""
    for line in file.read_text(encoding="utf-8").splitlines():
        words = line.lstrip("#").strip()
        if line.startswith("#") and words and not words.startswith("yaml-language-server"):
            return words
    return ""


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe, given a path or the name of a shipped recipe.

    Raises RecipeError with the nearest name if it does not exist.
    """
    name = os.fspath(name_or_path)
    path = Path(os.path.expanduser(name))
    shipped = shipped_files(recipes_folder())
    if os.path.exists(path) and not os.path.isdir(path):
        if data_ending(path) in DATA_ENDINGS and not (path.suffix == ".json" and _looks_like_recipe(path)):
            raise RecipeError.of(
                "this is data, not a recipe", file_label(path), f"Write a recipe for it: llmtune init {name}"
            )
        return path
    if os.path.isdir(path) and name not in shipped:
        has_recipe = any(path.glob("*.y*ml"))
        fix = "Name the YAML file in it." if has_recipe else f"Write a recipe for its rows: llmtune init {name}"
        raise RecipeError.of("this is a folder, not a recipe file", file_label(path), fix)
    bare = name.removesuffix(".yaml")
    if bare in shipped:
        return shipped[bare]
    names = ", ".join(shipped) or "none"
    if os.sep in name or name.endswith((".yaml", ".yml")):
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) or nearest(bare, list(shipped))
        raise RecipeError.of(f"no such recipe file: {name}", None, f"Check the path.{hint} Shipped recipes: {names}.")
    fix = f"{nearest(name, list(shipped))} Shipped: {names}.".strip()
    raise RecipeError.of(f"recipe {name!r} not found: neither a file nor a shipped recipe", None, fix)


def _looks_like_recipe(path: Path) -> bool:
    """Return whether a JSON file looks like a recipe, with `task` and `data`; JSON is valid YAML."""
    with path.open(errors="replace") as file:
        start = file.read(2**16)
    return all(f'"{key}"' in start for key in ("task", "data"))


def new_recipe(task: str) -> str:
    """Return the text of a valid starter recipe for `task`; `SET` marks the values to replace.

    Raises RecipeError if the task is unknown, or has no starter.
    """
    if task not in TASK_FACTS:
        fix = f"{nearest(task, list(TASK_FACTS))} Tasks: {', '.join(TASK_FACTS)}.".strip()
        raise RecipeError.of(f"unknown task '{task}'", "--task", fix)
    if not (text := read_starter(task)):
        raise RecipeError.of(f"task {task} has no starter recipe", "--task", "Write one for your rows: llmtune init")
    return text


def read_starter(task: str) -> str:
    """Return the text of a task's starter recipe; empty if it has none."""
    starter = recipes_folder() / "starters" / f"{task}.yaml"
    return starter.read_text(encoding="utf-8") if starter.is_file() else ""
