"""Loads a recipe: reads its layers, checks it whole, makes its paths absolute, and knows where each value came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmtune.recipe.builtin import find_recipe
from llmtune.recipe.check import check
from llmtune.recipe.compose import apply_sets, read_layers
from llmtune.recipe.path_resolution import make_absolute
from llmtune.recipe.provenance import list_origins, restore_origins
from llmtune.recipe.rules import find_all
from llmtune.recipe.rules_tasks import default_metrics
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import Places
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.yaml_writer import write_yaml


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that is whole and right, and how it came about."""

    recipe: Recipe
    """With absolute paths and the task's metrics filled in."""
    origins: dict[str, str]
    """Dotted key -> `file:line`, `--set` or `default`; items of a list of sources are counted: `data.train.0.path`."""
    file: Path
    fingerprint: str
    """Hex sha256 over all that decides what is trained, paths as written; see `fingerprint`."""
    without_effect: frozenset[str] = field(default_factory=frozenset)
    """Keys whose defaults have no effect in this recipe."""

    def to_yaml(self, with_origins: bool = True) -> str:
        """Return YAML that loads to the same recipe, every value with its origin as a comment."""
        return write_yaml(self.recipe, self.origins, self.without_effect, with_origins)


def fingerprint(recipe: Recipe) -> str:
    """Hash what decides the trained model: seed, task and its section, data, model, adapter, train.

    A new name, gate, metric or generation setting leaves it as it is, and so does a further seed: what is trained with
    it lies in a folder of its own.
    """
    section = TASK_FACTS[recipe.task].section
    parts = {"seed", "task", "data", "model", "adapter", "train", *([section] if section else [])}
    dumped = recipe.model_dump(mode="json", include=parts)
    dumped["train"]["seeds"] = []
    text = json.dumps(dumped, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def default_name(file: Path) -> str:
    """Make a run's name from the recipe file's name."""
    letters = [letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in file.stem]
    return "".join(letters).lstrip("._-")[:64] or "run"


def load_recipe(name_or_path: str | os.PathLike[str], sets: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe file, or a shipped recipe by name, with `KEY=VALUE` texts laid over it.

    Raises RecipeError with every problem that was found, each with its place and what to do.
    """
    file = find_recipe(name_or_path)
    root = apply_sets(read_layers(file), sets)
    written = check(root, default_name(file))
    places = Places(root)
    recipe = fill_metrics(make_absolute(written, places))
    return LoadedRecipe(
        recipe=recipe,
        origins=list_origins(recipe, places),
        file=Path(os.path.abspath(file)),
        fingerprint=fingerprint(written),
        without_effect=frozenset(
            finding.key
            for finding in find_all(recipe, Places(root, everything=True))
            if not places.stated(finding.key)  # a default, or taken back by null
        ),
    )


def keep_origins(loaded: LoadedRecipe, text: str) -> LoadedRecipe:
    """Give values the origins that stand as comments in `text`, the resolved recipe that `loaded` was loaded from.

    What `--set` changed keeps `--set`; a value without a comment keeps its place in the file.

    Raises RecipeError if `text` is not YAML.
    """
    return replace(loaded, origins=restore_origins(loaded.origins, loaded.recipe, text))


def fill_metrics(recipe: Recipe) -> Recipe:
    """Put the task's own choice of metrics where none are stated."""
    if recipe.evaluate.metrics:
        return recipe
    evaluate = recipe.evaluate.model_copy(update={"metrics": default_metrics(recipe)})
    return recipe.model_copy(update={"evaluate": evaluate})
