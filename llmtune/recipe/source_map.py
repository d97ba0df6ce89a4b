"""Origins of recipe values (file and line, `--set`, or default), and the collected problems with them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import Problem
from llmtune.recipe.section import BRANCHES, RELEASE_ADDRESS, RELEASE_PREFIX, RecipeSection
from llmtune.recipe.yaml_reader import Node, parse_yaml

Key = Sequence[str | int]
DEFAULT = "default"
SET = "--set"
SHORT_FORMS: Mapping[str, type | tuple[type, ...]] = {
    "path": str,
    "task": str,
    "coverage": float,
    "products": (str, list),
}
"""Keys that a plain value of this type sets, in place of their section."""


@dataclass(frozen=True)
class SourceMap:
    """The values stated in a recipe, by key path."""

    root: Node

    def find(self, key: Key) -> tuple[Node, bool]:
        """Return the deepest existing node on the path `key`, and whether the complete path exists.

        A single source counts as a list of one, and a short form as the key in `SHORT_FORMS`: `data.train.0.path` finds
        both. A name in a mapping may contain dots, as a file's does.
        """
        node = self.root
        for i, step in enumerate(key):
            value, rest = node.value, ".".join(map(str, key[i:]))
            if isinstance(value, dict) and rest in value:
                return value[rest], True
            if isinstance(value, dict) and str(step) in value:
                node = value[str(step)]
            elif isinstance(value, list) and str(step).isdigit() and int(step) < len(value):
                node = value[int(step)]
            elif step in BRANCHES or step == 0 or isinstance(value, SHORT_FORMS.get(str(step), ())):
                continue
            else:
                return node, False
        return node, True

    def stated(self, key: str) -> bool:
        """Return whether a dotted key has a value other than null."""
        node, exists = self.find(split(key))
        return exists and node.value is not None

    def origin(self, key: Key) -> str:
        """Return `file:line`, `--set` or `default`."""
        node, exists = self.find(key)
        return node.origin if exists else DEFAULT

    def where(self, key: Key) -> str:
        """Return the place to report for an error in `key`, stated or missing."""
        origin = self.find(key)[0].origin
        return f"{SET} {dotted(key)}" if origin == SET else origin

    def folder(self, key: str) -> Path:
        """Return the folder that paths at a dotted key are relative to."""
        return self.find(split(key))[0].folder


def split(key: str) -> list[str | int]:
    """Split a dotted key; numbers are list indices."""
    return [int(step) if step.isdecimal() else step for step in key.split(".")]


def dotted(key: Key) -> str:
    """Join a key path with dots, without names of union branches."""
    return ".".join(str(step) for step in key if step not in BRANCHES)


def walk(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield every dotted key with its value; sections and sources yield the keys in them."""
    if isinstance(value, RecipeSection):
        for name, inner in value:
            yield from walk(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, tuple) and any(isinstance(item, RecipeSection) for item in value):
        for i, item in enumerate(value):
            yield from walk(item, f"{key}.{i}")
    else:
        yield key, value


def list_origins(recipe: RecipeSection, source_map: SourceMap) -> dict[str, str]:
    """Return the origin of every value by dotted key; keys of a mapping have separate origins."""
    origins: dict[str, str] = {}
    for key, value in walk(recipe):
        origins[key] = source_map.origin(split(key))
        for name in value if isinstance(value, dict) else ():
            node, exists = source_map.find([*key.split("."), name])
            origins[f"{key}.{name}"] = node.origin if exists else origins[key]
    return origins


def restore_origins(origins: Mapping[str, str], recipe: RecipeSection, text: str) -> dict[str, str]:
    """Replace origins with the comments in `text`, a resolved recipe, except for values from `--set`.

    Raises RecipeError if `text` is not YAML.
    """
    lines = text.splitlines()
    in_text = list_origins(recipe, SourceMap(parse_yaml(text, "", Path())))
    comments: dict[str, str] = {}
    for key, origin in in_text.items():
        _, mark, comment = (
            lines[int(origin.removeprefix(":")) - 1].rpartition("  # ") if origin != DEFAULT else ("",) * 3
        )
        if mark:
            comments[key] = comment
    for key, value in walk(recipe):
        if isinstance(value, dict) and value and f"{key}.{[*value][-1]}" in comments:
            comments[key] = comments[f"{key}.{[*value][-1]}"]  # a mapping's comments follow its items
    return {key: origin if origin == SET else comments.get(key, origin) for key, origin in origins.items()}


class Diagnostics:
    """Collects the problems reported by the sections' `check` methods, each with the keys involved."""

    def __init__(self, source_map: SourceMap, broken: Collection[str] = (), assume_stated: bool = False) -> None:
        """Start without problems.

        Args:
            source_map: the origins of the recipe's values.
            broken: keys with invalid values; problems that involve one of them are skipped.
            assume_stated: treat every key as stated, to find the defaults without effect.
        """
        self.source_map = source_map
        self.assume_stated = assume_stated
        self.problems: list[Problem] = []
        self.keys: set[str] = set()
        self._broken = broken

    def stated(self, key: str) -> bool:
        """Return whether the recipe states a value other than null at a dotted key."""
        return self.assume_stated or self.source_map.stated(key)

    def add(self, key: str, what: str, fix: str, *because: str) -> None:
        """Report a problem with a key and its fix; `because` has the other keys involved."""
        if not any(name == other or name.startswith(f"{other}.") for name in (key, *because) for other in self._broken):
            self.problems.append(Problem(what, self.source_map.where(split(key)), fix))
            self.keys.add(key)

    def check_release(self, key: str, value: str | None) -> None:
        """Report a value that begins like the address of a release but is none."""
        if value is not None and value.startswith(RELEASE_PREFIX) and RELEASE_ADDRESS.fullmatch(value) is None:
            what = f"{value!r} is not the address of a release"
            self.add(key, what, "Write release:NAME for the current release, or release:NAME@HASH for an older one.")

    def no_effect(self, key: str, why: str, fix: str, *because: str) -> None:
        """Report a key without effect if the recipe states it."""
        if self.stated(key):
            self.add(key, f"'{key}' has no effect {why}", fix, *because)

    def none_has_effect(
        self, section: RecipeSection, prefix: str, names: Iterable[str], why: str, fix: str, *because: str
    ) -> None:
        """Report each of `names` that has a value, as a key without effect."""
        for name in names:
            if getattr(section, name) is not None:
                self.no_effect(f"{prefix}.{name}", why, fix, *because)

    def repeated(self, key: str, values: Collection[Hashable], noun: str) -> None:
        """Report a list with a duplicate value."""
        if len(set(values)) < len(values):
            self.add(key, f"'{key}' names {noun} twice", "Name each once.")
