"""Writes a recipe as YAML with the origin of each value as a comment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtune.recipe.data_section import Source
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import REMOTE, RecipeSection
from llmtune.recipe.source_map import DEFAULT
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.train_section import CHOSEN_KEYS
from llmtune.recipe.yaml_reader import resolve_scalar

TASK_SECTIONS = {facts.section for facts in TASK_FACTS.values()}
PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*")
CHOSEN = frozenset(f"train.{key}" for key in CHOSEN_KEYS)
SWITCHES = ("y", "n", "yes", "no", "on", "off")
"""Strings that YAML 1.1 reads as booleans; quoted, so YAML 1.1 readers see strings too."""


def scalar(value: object) -> str:
    """Write a value on one line in YAML flow style: JSON, except for plain strings and non-finite numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, str):
        return plain_or_quoted(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(scalar(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{quoted(str(key))}: {scalar(item)}' for key, item in value.items())}}}"
    return json.dumps(value)


def source_line(split: str, source: Source, **changes: object) -> str:
    """Return the recipe line of a source with some keys changed."""
    stated = source.model_dump(mode="json", exclude_defaults=True) | {"path": written_path(source.path)} | changes
    return f"{split}: {flow(stated)}"


def written_path(path: str) -> str:
    """Return a source's path as written in a recipe, relative if it is below the working folder."""
    working = Path.cwd()
    below = not path.startswith(REMOTE) and Path(path).is_relative_to(working)
    return str(Path(path).relative_to(working)) if below else path


def flow(value: object) -> str:
    """Write a value on one line, with plain keys."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {flow(item)}' for key, item in value.items())}}}"
    return scalar(value)


def plain_or_quoted(value: str) -> str:
    """Write a string without quotes if YAML still reads it as a string, else quoted."""
    plain = PLAIN.fullmatch(value) and isinstance(resolve_scalar(value), str) and value.lower() not in SWITCHES
    return value if plain else quoted(value)


def quoted(value: str) -> str:
    """Write a string in double quotes; unprintable characters are escaped."""
    letters = (json.dumps(letter)[1:-1] if letter in '"\\' or letter < " " else letter for letter in value)
    escaped = (letter if letter.isprintable() or len(letter) > 1 else f"\\U{ord(letter):08x}" for letter in letters)
    return f'"{"".join(escaped)}"'


@dataclass(frozen=True)
class Writer:
    """Writes sections, one value per line; without notes, only keys that have an effect."""

    origins: dict[str, str]
    idle: frozenset[str]
    with_notes: bool

    def note(self, *keys: str) -> str:
        """Return the comment after a value: the origin of the first of `keys` that has one."""
        origin = next((self.origins[key] for key in keys if key in self.origins), None)
        return (
            ""
            if origin is None or not self.with_notes
            else f"  # {''.join(c if c.isprintable() else '?' for c in origin)}"
        )

    def section(self, section: RecipeSection, key: str, indent: str) -> Iterator[str]:
        """Yield the lines of one section, without the sections of other tasks."""
        for name in (*type(section).model_fields, *(section.model_extra or ())):
            value = getattr(section, name)
            path = f"{key}.{name}" if key else name
            if value is None and name in TASK_SECTIONS:
                continue
            yield from self.value(name, value, path, indent)

    def value(self, name: str, value: object, path: str, indent: str) -> Iterator[str]:
        """Yield the lines of one key."""
        if isinstance(value, RecipeSection):
            yield f"{indent}{name}:"
            yield from self.section(value, path, f"{indent}  ")
        elif isinstance(value, tuple) and value and isinstance(value[0], RecipeSection):
            yield f"{indent}{name}:"
            for i, item in enumerate(value):
                first, *others = self.section(item, f"{path}.{i}", f"{indent}    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from others
        elif path in self.idle:
            if self.with_notes:
                yield f"{indent}# {name}: {scalar(value)}  # {DEFAULT}, without effect here"
        elif path in CHOSEN and self.origins.get(path) == DEFAULT:  # stated, it would replace the run's choice
            if self.with_notes:
                yield f"{indent}# {name}: {scalar(value)}  # {DEFAULT}, until the run chooses a value"
        elif isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            for inner, item in value.items():
                yield f"{indent}  {plain_or_quoted(str(inner))}: {scalar(item)}{self.note(f'{path}.{inner}', path)}"
        else:
            yield f"{indent}{name}: {scalar(value)}{self.note(path)}"


def write_yaml(recipe: Recipe, origins: dict[str, str], without_effect: frozenset[str], with_notes: bool) -> str:
    """Return YAML that loads to the same recipe; with notes, defaults without effect or until a choice are comments."""
    return "\n".join(Writer(origins, without_effect, with_notes).section(recipe, "", "")) + "\n"
