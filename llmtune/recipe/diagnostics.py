"""Collects what is wrong with a recipe whose keys and values fit the schema."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

from llmtune.errors import Problem
from llmtune.recipe.section import Section
from llmtune.recipe.source_map import SourceMap, split


class Diagnostics:
    """The problems that the sections' `check` methods report, each with the keys that it rests on."""

    def __init__(self, source_map: SourceMap, broken: Collection[str] = (), assume_stated: bool = False) -> None:
        """Collect problems of one recipe.

        Args:
            source_map: where its values stand.
            broken: keys that are wrong by themselves: a problem that rests on one of them is left out.
            assume_stated: take every key for stated, to learn which defaults have no effect.
        """
        self.source_map = source_map
        self.assume_stated = assume_stated
        self.problems: list[Problem] = []
        self.keys: set[str] = set()
        self._broken = broken

    def stated(self, key: str) -> bool:
        """Whether the recipe states a value other than null at a dotted key."""
        return self.assume_stated or self.source_map.stated(key)

    def add(self, key: str, what: str, fix: str, *because: str) -> None:
        """Report what is wrong with a key and what to do; `because` are the other keys that this rests on."""
        if not any(name == other or name.startswith(f"{other}.") for name in (key, *because) for other in self._broken):
            self.problems.append(Problem(what, self.source_map.where(split(key)), fix))
            self.keys.add(key)

    def no_effect(self, key: str, why: str, fix: str, *because: str) -> None:
        """Report a key without effect if the recipe states it."""
        if self.stated(key):
            self.add(key, f"'{key}' has no effect {why}", fix, *because)

    def none_has_effect(
        self, section: Section, prefix: str, names: Iterable[str], why: str, fix: str, *because: str
    ) -> None:
        """Report those keys of a section without effect that have a value."""
        for name in names:
            if getattr(section, name) is not None:
                self.no_effect(f"{prefix}.{name}", why, fix, *because)

    def repeated(self, key: str, values: Collection[Hashable], noun: str) -> None:
        """Report a list that names something twice."""
        if len(set(values)) < len(values):
            self.add(key, f"'{key}' names {noun} twice", "Name each once.")
