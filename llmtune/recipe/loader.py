"""Loads a recipe from its file, the files it extends and `--set`; checks it, resolves paths and records origins."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmtune.recipe.builtin import find_recipe
from llmtune.recipe.layers import apply_sets, drop_key, read_layers
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import AnySection, change_paths
from llmtune.recipe.source_map import DEFAULT, Diagnostics, SourceMap, list_origins, restore_origins
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.train_section import CHOSEN_KEYS, TrainSection
from llmtune.recipe.validation import validate
from llmtune.recipe.yaml_reader import Node, read_recipe_text
from llmtune.recipe.yaml_writer import write_yaml

ADDED = (
    *(("train", name) for name in ("optim_args", "loss_type", "neftune_noise_alpha")),
    *(("data", "system_prompt"), ("data", "columns"), ("data", "roles"), ("data", "negatives")),
    *(("model", "licences"), ("model", "trials"), ("model", "image_pixels"), ("adapter", "train_projector")),
    ("distil", "answers"),
)
"""Keys added later. The hash omits their defaults, so older runs keep their fingerprints."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A complete, valid recipe and the origins of its values."""

    recipe: Recipe
    """With absolute paths and the task's metrics filled in."""
    origins: dict[str, str]
    """Dotted key -> `file:line`, `--set` or `default`; sources in a list have an index: `data.train.0.path`."""
    file: Path
    fingerprint: str
    """Hex sha256 over everything that affects training, paths as written; see `fingerprint`."""
    without_effect: frozenset[str] = field(default_factory=frozenset)
    """Keys whose defaults have no effect in this recipe."""

    def to_yaml(self, with_origins: bool = True) -> str:
        """Return YAML that loads to the same recipe, with the origin of each value as a comment."""
        return write_yaml(self.recipe, self.origins, self.without_effect, with_origins)


def load_recipe(name_or_path: str | os.PathLike[str], sets: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe file, or a shipped recipe by name, and apply `KEY=VALUE` overrides.

    Raises RecipeError with every problem found, each with its place and fix.
    """
    file = find_recipe(name_or_path)
    return resolve_recipe(apply_sets(read_layers(file, Recipe.model_fields), sets), file)


def resolve_recipe(root: Node, file: Path) -> LoadedRecipe:
    """Check a recipe and fill in defaults. Raises RecipeError with every problem."""
    source_map = SourceMap(root)
    written = validate(root, default_name(file))
    recipe = fill_defaults(absolute_paths(written, source_map))
    return LoadedRecipe(
        recipe=recipe,
        origins=list_origins(recipe, source_map),
        file=Path(os.path.abspath(file)),
        fingerprint=fingerprint(written),
        without_effect=frozenset(key for key in find_idle_defaults(recipe) if not source_map.stated(key)),
    )


def find_idle_defaults(recipe: Recipe) -> set[str]:
    """Return the keys that would be reported as without effect if the recipe stated all keys."""
    diagnostics = Diagnostics(SourceMap(Node({}, DEFAULT, Path())), assume_stated=True)
    recipe.check(diagnostics)
    return diagnostics.keys


def reload_recipe(file: Path, sets: Sequence[str] = (), changeable: Collection[str] = ()) -> LoadedRecipe:
    """Load the resolved recipe of a run, with origins from the comments after its values.

    Values changed by `sets` have the origin `--set`, values without a comment their line. Defaults in the `changeable`
    sections count as not stated, so they never conflict with `sets`.

    Raises RecipeError.
    """
    text, root = read_recipe_text(file), read_layers(file, Recipe.model_fields)
    loaded = resolve_recipe(root, file)
    loaded = replace(loaded, origins=restore_origins(loaded.origins, loaded.recipe, text))
    if sets:
        for key, origin in loaded.origins.items():
            if origin == DEFAULT and key.split(".")[0] in changeable:
                root = drop_key(root, key.split("."))
        changed = resolve_recipe(apply_sets(root, sets), file)
        loaded = replace(changed, origins=restore_origins(changed.origins, changed.recipe, text))
    return loaded


def fingerprint(recipe: Recipe) -> str:
    """Hash everything that affects the trained model: seed, task and its section, data, model, adapter, train.

    Name, gates, metrics and generation settings do not affect it, nor does `data.corpus`, unless negatives are mined in
    it. Neither do additional seeds and control runs, whose results are in their own folders.
    """
    section = TASK_FACTS[recipe.task].section
    is_hashed = section and (TASK_FACTS[recipe.task].hashes_missing_section or getattr(recipe, section) is not None)
    parts = {"seed", "task", "data", "model", "adapter", "train", *([section] if section and is_hashed else [])}
    dumped = recipe.model_dump(mode="json", include=parts)
    dumped["train"]["seeds"] = []
    if section and dumped.get(section):
        dumped[section].pop("control", None)
    if recipe.distil is not None:
        dumped["distil"] = recipe.distil.model_dump(mode="json", exclude={"control"})
    defaults = [key for key in CHOSEN_KEYS if getattr(recipe.train, key) == TrainSection.model_fields[key].default]
    if stated := sorted(recipe.train.model_fields_set.intersection(defaults)):
        dumped["train"]["stated"] = stated  # without the key, another value would be chosen
    if recipe.data.corpus is None or recipe.data.negatives is None:
        del dumped["data"]["corpus"]
    dumped["data"]["split_by"] = recipe.data.split_by or TASK_FACTS[recipe.task].split_by
    for part, name in (*ADDED, (section or "", "rename")):
        values = dumped.get(part) or {}
        if values.get(name, name) in (None, 0, [], {}, "nll"):
            del values[name]
    text = json.dumps(dumped, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def default_name(file: Path) -> str:
    """Make a run's name from the recipe file's name."""
    letters = [letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in file.stem]
    return "".join(letters).lstrip("._-")[:64] or "run"


def fill_defaults(recipe: Recipe) -> Recipe:
    """Fill in the task's default metrics, and the column by which the task groups rows, if the recipe names none."""
    data, evaluate = recipe.data, recipe.evaluate
    metrics = evaluate.metrics or recipe.variant.default_metrics
    split_by = data.split_by or (TASK_FACTS[recipe.task].split_by if data.splits_rows else None)
    update = {
        "data": data.model_copy(update={"split_by": split_by}),
        "evaluate": evaluate.model_copy(update={"metrics": metrics}),
    }
    return recipe.model_copy(update=update)


def absolute_paths(section: AnySection, source_map: SourceMap) -> AnySection:
    """Return a section with absolute paths, resolved against the recipe file or, for `--set`, the working folder."""
    return change_paths(section, lambda key, value, resolve: resolve(value, source_map.folder(key)))
