"""What each tool's documentation says about an outcome, read from `tools/NAME.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """An outcome that the documentation names as the tool's choice, for one setting in one column."""

    outcome: str
    """The beginning of the outcome's name."""
    column: str
    setting: str
    """The name of a setting, with dots for a nested one."""
    address: str
    value: Any = None
    """The setting's value; none: the tool's own default."""


@dataclass(frozen=True)
class Search:
    """A search of the documentation that did not find an outcome."""

    case: str
    outcome: str
    """The beginning of the outcome's name."""
    where: str
    date: str


@dataclass(frozen=True)
class Statements:
    """The choices of a tool, and the searches of its documentation."""

    choices: Sequence[Choice] = ()
    searches: Sequence[Search] = ()

    def of(self, case: str) -> Statements:
        """Return the statements that apply to a case."""
        return replace(self, searches=[search for search in self.searches if search.case == case])

    def find_choice(self, outcome: str, column: str, configuration: Configuration) -> str:
        """Return the address that documents an outcome, or nothing."""
        settings = flatten(configuration)
        matches = (
            choice.address
            for choice in self.choices
            if outcome.startswith(choice.outcome)
            and column == choice.column
            and settings.get(choice.setting) == choice.value
        )
        return next(matches, "")

    def find_search(self, outcome: str) -> str:
        """Return where and when the documentation was searched for an outcome, or nothing."""
        matches = (f"{search.where}, {search.date}" for search in self.searches if outcome.startswith(search.outcome))
        return next(matches, "")


def read_statements(file: Path) -> Statements:
    """Return the statements of a tool; none if it has no file."""
    if not file.exists():
        return Statements()
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    searches = [Search(**{**entry, "date": str(entry["date"])}) for entry in table.get("searched", ())]
    return Statements([Choice(**entry) for entry in table.get("documented", ())], searches)


def flatten(configuration: Configuration, prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in configuration.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
