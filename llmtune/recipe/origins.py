"""Where every value of a recipe came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmtune.recipe.places import Places
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import Section


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
