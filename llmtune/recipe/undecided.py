"""Values that `llmtune init` leaves to the user: a recipe with one is refused, with the choices of its comment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llmtune.errors import Problem, RecipeError, read_origin
from llmtune.recipe.source_map import Key, dotted
from llmtune.recipe.yaml_reader import Node, read_recipe_text

UNDECIDED = "DECIDE"
"""The value of such a key. In a list it is an ordinary text."""


def list_undecided(node: Node, key: Key = ()) -> Iterator[tuple[Key, Problem]]:
    """Yield each key whose value is still open, with its problem."""
    if isinstance(node.value, dict):
        for name, inner in node.value.items():
            yield from list_undecided(inner, (*key, name))
    elif isinstance(node.value, list):
        for place, inner in enumerate(node.value):
            if isinstance(inner.value, dict):
                yield from list_undecided(inner, (*key, place))
    elif node.value == UNDECIDED and key:
        choices = _read_comment(node)
        choose = f"Set it: {choices}" if choices else "Set it to your choice"
        fix = f"{choose}. On the command line: --set {dotted(key)}=..."
        yield key, Problem(f"'{dotted(key)}' is {UNDECIDED}: you have to choose its value", node.origin, fix)


def _read_comment(node: Node) -> str:
    """Return the comment after an open value; empty if there is none."""
    file, line, _ = read_origin(node.origin)
    if line is None:
        return ""
    with suppress(RecipeError):  # the values of a migrated configuration have no recipe file yet
        text = read_recipe_text(Path(file)).splitlines()[line - 1]
        return text.partition(UNDECIDED)[2].partition("#")[2].strip().rstrip(".")
    return ""
