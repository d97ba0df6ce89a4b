"""Puts a recipe together: the file, the files that it extends, and `--set`; what stands nearer wins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmtune.errors import Problem, RecipeError
from llmtune.recipe.yaml_reader import MAX_DEPTH, Stated, label, parse_yaml, read_text

MAX_EXTENDS = 8
SET = "--set"
SOURCE_PLACES = (("data", "train"), ("data", "validation"), ("data", "test"))


def merge(below: Stated, above: Stated, place: tuple[str, ...] = ()) -> Stated:
    """Lay one value over another: mappings are merged key by key, all else is replaced; a source is one value."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict) or place in SOURCE_PLACES:
        return Stated(
            above.value,
            above.origin,
            above.folder,
            overrides=above.value is None and (below.value is not None or below.overrides),
        )
    merged = dict(below.value)
    for key, item in above.value.items():
        merged[key] = merge(merged[key], item, (*place, key)) if key in merged else item
    return Stated(merged, above.origin, above.folder)


def read_layers(path: Path, chain: tuple[Path, ...] = (), said_at: str | None = None) -> Stated:
    """Read a recipe file and all that it extends. Raises RecipeError."""
    real = Path(os.path.realpath(path))
    if real in chain:
        circle = " -> ".join(label(file) for file in (*chain[chain.index(real) :], real))
        raise RecipeError.of(f"`extends` goes in a circle: {circle}", said_at, "Let one of them extend nothing.")
    if len(chain) >= MAX_EXTENDS:
        raise RecipeError.of(f"`extends` is more than {MAX_EXTENDS} files deep", said_at, "Join some of the files.")
    if said_at is not None and not os.path.isfile(path):
        raise RecipeError.of(
            f"the recipe to extend is not there: {path}", said_at, "Check the path; it is relative to this file."
        )
    folder = Path(os.path.abspath(path)).parent
    root = parse_yaml(read_text(path), label(path), folder)
    if root.value is None:
        raise RecipeError.of("an empty recipe", label(path), "Start from `llmtune recipes new --task chat`.")
    if not isinstance(root.value, dict):
        raise RecipeError.of(
            "a recipe is a mapping of keys", root.origin, "Write `key: value` lines, e.g. `task: chat`."
        )
    keys = dict(root.value)
    extends = keys.pop("extends", None)
    own = Stated(keys, root.origin, folder)
    if extends is None or extends.value is None:
        return own
    if not isinstance(extends.value, str) or not extends.value:
        raise RecipeError.of(
            "'extends' must be the path of one recipe file", extends.origin, "Write `extends: base.yaml`."
        )
    base = Path(os.path.join(folder, os.path.expanduser(extends.value)))
    return merge(read_layers(base, (*chain, real), extends.origin), own)


def split_set(text: str) -> tuple[list[str], Stated]:
    """Read one `KEY=VALUE`. Raises RecipeError."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise RecipeError.of(
            f"{text!r} is not KEY=VALUE", SET, "Write the key with dots, e.g. `--set train.learning_rate=1e-4`."
        )
    if parts[0] == "extends":
        raise RecipeError.of("'extends' cannot be set from outside", f"{SET} extends", "Write it in the recipe file.")
    stated = parse_yaml(value, f"{SET} {key.strip()}", Path.cwd(), by_line=False)
    return parts, relabel(stated)


def relabel(stated: Stated) -> Stated:
    """Give a value and all in it the origin `--set`."""
    value = stated.value
    if isinstance(value, dict):
        value = {key: relabel(item) for key, item in value.items()}
    elif isinstance(value, list):
        value = [relabel(item) for item in value]
    return Stated(value, SET, stated.folder)


def assign(below: Stated | None, parts: Sequence[str], above: Stated, place: tuple[str, ...] = ()) -> Stated:
    """Lay a value over the one that stands at a dotted key. Raises RecipeError if the way there is blocked."""
    if not parts:
        return above if below is None else merge(below, above, place)
    key, rest = parts[0], parts[1:]
    value = below.value if below else None
    is_source = place in SOURCE_PLACES or (place[:2] in SOURCE_PLACES and len(place) == 3 and place[2].isdigit())
    if place in SOURCE_PLACES and key == "0" and isinstance(value, str | dict):
        return assign(below, rest, above, place)  # a single source is a list of one
    if is_source and isinstance(value, str) and below:
        value = {"path": below}
    if isinstance(value, list):
        if not key.isascii() or not key.isdigit() or int(key[:9]) >= len(value):
            raise RecipeError.of(
                f"'{'.'.join(place)}' is a list of {len(value)}", f"{SET} {'.'.join((*place, *parts))}", "Count from 0."
            )
        items = [*value]
        items[int(key)] = assign(items[int(key)], rest, above, (*place, key))
        return Stated(items, below.origin if below else SET, below.folder if below else above.folder)
    if value is not None and not isinstance(value, dict):
        raise RecipeError.of(
            f"'{'.'.join(place)}' is {value!r}, which has no keys",
            f"{SET} {'.'.join((*place, *parts))}",
            "Set it as a whole.",
        )
    keys = dict(value or {})
    keys[key] = assign(keys.get(key), rest, above, (*place, key))
    return Stated(keys, below.origin if below else SET, below.folder if below else above.folder)


def apply_sets(root: Stated, sets: Sequence[str]) -> Stated:
    """Lay every `KEY=VALUE` over the recipe, the last one on top. Raises RecipeError with all that are wrong."""
    problems: list[Problem] = []
    for text in sets:
        try:
            parts, value = split_set(text)
            root = assign(root, parts, value)
        except RecipeError as error:
            problems.extend(error.problems)
    RecipeError.collect(problems)
    return root
