"""Where the value of a key stands: from a key path back to the file and line, or `--set`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.recipe.base_section import BRANCHES
from llmtune.recipe.yaml_reader import Stated

Key = Sequence[str | int]
DEFAULT = "default"


@dataclass(frozen=True)
class Places:
    """The stated values of a recipe, to be asked by key path."""

    root: Stated
    everything: bool = False
    """Ask as if every key were stated: for telling which defaults have no effect."""

    def find(self, key: Key) -> tuple[Stated, bool]:
        """Return the deepest stated value on the way to `key`, and whether the way was gone to its end.

        A source stands for a list of one, and a text for a source's `path`, so `data.train.0.path` finds both.
        """
        at = self.root
        for step in key:
            value = at.value
            if isinstance(value, dict) and str(step) in value:
                at = value[str(step)]
            elif isinstance(value, list) and str(step).isdigit() and int(step) < len(value):
                at = value[int(step)]
            elif step in BRANCHES or step == 0 or (step in ("path", "task") and isinstance(value, str)):
                continue
            else:
                return at, False
        return at, True

    def stated(self, key: str) -> bool:
        """Whether a value other than null stands at a dotted key."""
        if self.everything:
            return True
        at, found = self.find(split(key))
        return found and at.value is not None

    def origin(self, key: str) -> str:
        """Return `file:line`, `--set` or `default`."""
        at, found = self.find(split(key))
        return at.origin if found else DEFAULT

    def where(self, key: Key) -> str:
        """Return the place to name in an error about `key`, stated or missing."""
        origin = self.find(key)[0].origin
        return f"--set {dotted(key)}" if origin == "--set" else origin

    def folder(self, key: str) -> Path:
        """Return what a path at `key` is relative to."""
        return self.find(split(key))[0].folder


def split(key: str) -> list[str | int]:
    """Take a dotted key apart; numbers count list items."""
    return [int(step) if step.isdecimal() else step for step in key.split(".")]


def dotted(key: Key) -> str:
    """Join a key path with dots, without names of union branches."""
    return ".".join(str(step) for step in key if step not in BRANCHES)
