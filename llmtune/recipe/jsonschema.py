"""The JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from llmtune.recipe.schema import Recipe

EXTENDS = "A recipe file to start from, relative to this one: its values hold where this one states none."


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12). It is looser than `llmtune recipes check`, which knows what rests on what.

    Keys that a recipe needs may stand in one that it extends, so they are asked for only where it extends none.
    """
    schema = Recipe.model_json_schema()
    required = schema.pop("required")
    schema["$defs"]["DataSection"].pop("required")
    extends = {"extends": {"type": "string", "minLength": 1, "title": "Extends", "description": EXTENDS}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "llmtune recipe",
        "properties": {**extends, **schema["properties"]},
        "anyOf": [{"required": ["extends"]}, {"required": required}],
    }
