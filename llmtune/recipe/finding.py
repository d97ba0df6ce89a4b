"""A finding: something wrong with one key of a recipe that fits the schema."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.recipe.source_map import Key, split


@dataclass(frozen=True)
class Finding:
    """What is wrong with a key, what to do, and the other keys that this rests on."""

    key: str
    what: str
    fix: str
    because: tuple[str, ...] = ()

    @property
    def path(self) -> Key:
        """The key path, taken apart."""
        return split(self.key)


def idle(key: str, why: str, fix: str, *because: str) -> Finding:
    """Find a key that would have no effect."""
    return Finding(key, f"'{key}' has no effect {why}", fix, because)
