"""Where every value of a recipe came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.recipe.base_section import Section
from llmtune.recipe.compose import SET
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import DEFAULT, Places
from llmtune.recipe.yaml_reader import parse_yaml


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key that holds a value of its own: of sections and sources the keys in them."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from walk(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        for i, item in enumerate(value):
            yield from walk(item, f"{key}.{i}")
    else:
        yield key, value


def list_origins(recipe: Recipe, places: Places) -> dict[str, str]:
    """Return the origin of every value by its dotted key; the keys of a mapping have their own."""
    origins: dict[str, str] = {}
    for key, value in walk(recipe):
        origins[key] = places.origin(key)
        if isinstance(value, dict):
            for name in value:
                at, found = places.find([*key.split("."), name])
                origins[f"{key}.{name}"] = at.origin if found else origins[key]
    return origins


def restore_origins(origins: Mapping[str, str], recipe: Recipe, text: str) -> dict[str, str]:
    """Return origins with those that stand as comments in `text`, a resolved recipe, but for what was set anew."""
    lines = text.splitlines()
    places = list_origins(recipe, Places(parse_yaml(text, "", Path())))
    notes = {key: note for key, place in places.items() if place != DEFAULT and (note := _note(lines, place))}
    for key, value in walk(recipe):
        if isinstance(value, dict) and value and f"{key}.{[*value][-1]}" in notes:
            notes[key] = notes[f"{key}.{[*value][-1]}"]  # a mapping says it behind its items
    return {key: origin if origin == SET else notes.get(key, origin) for key, origin in origins.items()}


def _note(lines: Sequence[str], place: str) -> str:
    """Return the comment that ends the line at `:line`; empty if there is none."""
    line = lines[int(place.removeprefix(":")) - 1]
    return line.rpartition("  # ")[2] if "  # " in line else ""
