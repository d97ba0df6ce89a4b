"""The layers of a recipe: `--set`, the file, and the files it extends. Earlier layers override later ones."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from llmtune.errors import Problem, RecipeError
from llmtune.recipe.source_map import SET
from llmtune.recipe.yaml_reader import MAX_DEPTH, Node, file_label, parse_yaml, read_recipe_text

MAX_EXTENDS = 8
INSTEAD = {
    "train.max_steps": "train.num_train_epochs",
    "train.num_train_epochs": "train.max_steps",
    "train.batch_tokens": "train.batch_size",
    "train.batch_size": "train.batch_tokens",
    "model.name": "model.candidates",
    "model.candidates": "model.name",
}
"""A key set on the command line -> the key in the file that it replaces."""
SOURCE_KEYS = (("data", "train"), ("data", "validation"), ("data", "test"))
LISTS = {("deploy",): "products"}
"""A section -> the key that a list, or one name, in its place sets."""


def read_layers(
    path: Path, recipe_keys: Collection[str] = (), chain: tuple[Path, ...] = (), stated_at: str | None = None
) -> Node:
    """Read a recipe file and all files it extends; `stated_at` is the place of the `extends` that names it.

    With `recipe_keys`, each extended file must have at least one of them. Otherwise a foreign recipe could extend a
    file with secrets, and error messages would show its keys. Raises RecipeError.
    """
    real = Path(os.path.realpath(path))
    if real in chain:
        circle = " -> ".join(file_label(file) for file in (*chain[chain.index(real) :], real))
        raise RecipeError.of(f"`extends` forms a cycle: {circle}", stated_at, "Remove one `extends`.")
    if len(chain) >= MAX_EXTENDS:
        raise RecipeError.of(f"`extends` is more than {MAX_EXTENDS} files deep", stated_at, "Merge some of the files.")
    if stated_at is not None and not os.path.isfile(path):
        fix = "Check the path; it is relative to this file."
        raise RecipeError.of(f"the recipe to extend was not found: {path}", stated_at, fix)
    folder = Path(os.path.abspath(path)).parent
    root = parse_yaml(read_recipe_text(path), file_label(path), folder)
    if root.value is None:
        raise RecipeError.of("the recipe is empty", file_label(path), "Start from `llmtune recipes new --task chat`.")
    if not isinstance(root.value, dict):
        fix = "Write `key: value` lines, e.g. `task: chat`."
        raise RecipeError.of("the recipe is not a mapping of keys", root.origin, fix)
    keys = dict(root.value)
    if stated_at is not None and recipe_keys and keys and not keys.keys() & {"extends", *recipe_keys}:
        fix = "Extend a recipe. Messages do not show the text of other files."
        raise RecipeError.of(f"{file_label(path)} is not a recipe: it has no recipe key", stated_at, fix)
    extends = keys.pop("extends", None)
    layer = Node(keys, root.origin, folder)
    if extends is None or extends.value is None:
        return layer
    if not isinstance(extends.value, str) or not extends.value:
        what = "'extends' must be the path of one recipe file"
        raise RecipeError.of(what, extends.origin, "Write `extends: base.yaml`.")
    below = Path(os.path.join(folder, os.path.expanduser(extends.value)))
    return overlay(read_layers(below, recipe_keys, (*chain, real), extends.origin), layer)


def overlay(below: Node, above: Node, key: tuple[str, ...] = ()) -> Node:
    """Override one value with another. Mappings are merged key by key; sources and all other values are replaced."""
    if key in LISTS and isinstance(below.value, dict) != isinstance(above.value, dict):
        below, above = (_as_section(node, LISTS[key]) for node in (below, above))
    if not isinstance(below.value, dict) or not isinstance(above.value, dict) or key in SOURCE_KEYS:
        overrides = above.value is None and (below.value is not None or below.overrides)
        return Node(above.value, above.origin, above.folder, overrides)
    merged = dict(below.value)
    for name, item in above.value.items():
        merged[name] = overlay(merged[name], item, (*key, name)) if name in merged else item
    return Node(merged, above.origin, above.folder)


def _as_section(node: Node, key: str) -> Node:
    """Write a list, or one name, in place of a section in full."""
    short = isinstance(node.value, list | str)
    return Node({key: node}, node.origin, node.folder) if short else node


def apply_sets(root: Node, sets: Sequence[str]) -> Node:
    """Apply every `KEY=VALUE` to the recipe in order. Raises one RecipeError with all wrong ones."""
    problems: list[Problem] = []
    keys = {text.partition("=")[0].strip() for text in sets}
    for text in sets:
        try:
            parts, value = split_set(text)
            other = INSTEAD.get(".".join(parts))
            if other is not None and other not in keys and value.value is not None:
                root = drop_key(root, other.split("."))
            root = assign(root, parts, value)
        except RecipeError as error:
            problems.extend(error.problems)
    RecipeError.collect(problems)
    return root


def split_set(text: str) -> tuple[list[str], Node]:
    """Parse one `KEY=VALUE`. Raises RecipeError."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        fix = "Use a dotted key, e.g. `--set train.learning_rate=1e-4`."
        raise RecipeError.of(f"{text!r} is not KEY=VALUE", SET, fix)
    if parts[0] == "extends":
        raise RecipeError.of("`--set` cannot set 'extends'", f"{SET} extends", "Write it in the recipe file.")
    return parts, relabel(parse_yaml(value, f"{SET} {key.strip()}", Path.cwd(), by_line=False))


def relabel(node: Node) -> Node:
    """Return a copy of a node and its children with the origin `--set`."""
    value = node.value
    if isinstance(value, dict):
        value = {key: relabel(item) for key, item in value.items()}
    elif isinstance(value, list):
        value = [relabel(item) for item in value]
    return Node(value, SET, node.folder)


def assign(below: Node | None, parts: Sequence[str], above: Node, key: tuple[str, ...] = ()) -> Node:
    """Set the value at a dotted key; `key` is the path so far, `parts` the rest of the path.

    Raises RecipeError if a value on the path has no keys.
    """
    if not parts:
        return above if below is None else overlay(below, above, key)
    name, rest = parts[0], parts[1:]
    value = below.value if below else None
    origin, folder = (below.origin, below.folder) if below else (SET, above.folder)
    where = f"{SET} {'.'.join((*key, *parts))}"
    is_source = key in SOURCE_KEYS or (key[:2] in SOURCE_KEYS and len(key) == 3 and key[2].isdigit())
    if key in SOURCE_KEYS and name == "0" and isinstance(value, str | dict):
        return assign(below, rest, above, key)  # a single source counts as a list of one
    if key in LISTS and below and not name.isdigit():
        value = _as_section(below, LISTS[key]).value
    if is_source and isinstance(value, str) and below:
        value = {"path": below}
    if isinstance(value, list):
        if not name.isascii() or not name.isdigit() or int(name[:9]) >= len(value):
            raise RecipeError.of(f"'{'.'.join(key)}' is a list of {len(value)}", where, "Use an index from 0.")
        items = [*value]
        items[int(name)] = assign(items[int(name)], rest, above, (*key, name))
        return Node(items, origin, folder)
    if value is not None and not isinstance(value, dict):
        raise RecipeError.of(f"'{'.'.join(key)}' is {value!r}, which has no keys", where, "Set its complete value.")
    keys = dict(value or {})
    keys[name] = assign(keys.get(name), rest, above, (*key, name))
    return Node(keys, origin, folder)


def drop_key(node: Node, key: Sequence[str]) -> Node:
    """Return a value without the entry at a key path."""
    if not isinstance(node.value, dict) or key[0] not in node.value:
        return node
    items = {name: item for name, item in node.value.items() if name != key[0]}
    if len(key) > 1:
        items[key[0]] = drop_key(node.value[key[0]], key[1:])
    return Node(items, node.origin, node.folder)
