"""A migrated recipe as YAML: behind each value the key that it comes from, below all of them what was refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.recipe.migration import nested
from llmtune.recipe.migration_rules import Migration, Setting
from llmtune.recipe.schema import Recipe
from llmtune.recipe.yaml_writer import scalar


def write_migrated(migration: Migration) -> str:
    """Return the text of the recipe, with comments."""
    config = migration.config
    tree = nested(migration.settings)
    first = f"# Made from {config.label} ({config.table.tool}); behind each value stands its key there."
    lines = [first, "recipe_version: 1"]
    for name in Recipe.model_fields:
        if name in tree:
            lines += _lines(name, tree[name], "")
    refused = [one for one in migration.outcomes if one.state == "refused"]
    same = [one.key for one in migration.outcomes if one.state == "carried" and not one.to]
    lines += ["", "# Not carried over:" if refused else "# Every key is carried over."]
    lines += [f"#   {one.shown}: {one.why}" for one in refused]
    lines += [f"# As here, so that nothing is stated: {', '.join(same)}."] if same else []
    lines += [f"# Look: {line}." for line in config.table.decide]
    return "".join(f"{''.join(c if c.isprintable() else '?' for c in line)}\n" for line in lines)


def _lines(name: str, value: Setting | Mapping[str, Any], indent: str) -> Iterator[str]:
    if isinstance(value, Setting):
        note = f"  # {', '.join(dict.fromkeys(value.keys))}" if value.keys else ""
        yield f"{indent}{scalar(name)}: {scalar(value.value)}{note}"
        return
    yield f"{indent}{scalar(name)}:"
    if value and all(key.isdigit() for key in value):
        for item in value.values():
            first, *others = [line for key, inner in item.items() for line in _lines(key, inner, f"{indent}    ")]
            yield f"{indent}  - {first.lstrip()}"
            yield from others
    else:
        for key, inner in value.items():
            yield from _lines(key, inner, f"{indent}  ")
