"""Reads YAML text into values that know where they stand; safe, bounded, YAML 1.2.

Values follow the core schema of YAML 1.2.2 (section 10.3): `1e-4` is a number, `no` and dates are text. Tags, merge
keys and duplicate keys are refused; size, depth and the number of values (aliases expanded) are bounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from llmtune.errors import Problem, RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_DIGITS = 300
MAX_INT = 2**63 - 1

Scalar = str | int | float | bool | None

NULL = re.compile(r"(?:null|Null|NULL|~|)")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))")


@dataclass(frozen=True)
class Stated:
    """A value and where it stands: mappings hold `Stated` by key, lists hold `Stated`, everything else is a scalar."""

    value: dict[str, Stated] | list[Stated] | Scalar
    origin: str
    """`file:line` of its key or list item, or `--set`."""
    folder: Path
    """What paths in it are relative to."""
    overrides: bool = False
    """Whether it is a null that takes back what a recipe below states."""

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


def resolve_scalar(text: str) -> Scalar:
    """Give a plain (unquoted) scalar its value by the core schema of YAML 1.2."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text):
        return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
    if FLOAT.fullmatch(text):
        return float(text)
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


@dataclass
class Composer:
    """Builds `Stated` values out of parser events, counting as it goes."""

    label: str
    folder: Path
    events: Iterator[Event]
    by_line: bool
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, Stated] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    values: int = 0

    def place(self, event: Event) -> str:
        """Return `file:line` of an event, or the label alone where lines mean nothing."""
        return f"{self.label}:{event.start_mark.line + 1}" if self.by_line else self.label

    def refuse(self, event: Event, what: str, fix: str) -> NoReturn:
        """Stop reading: what follows cannot be trusted."""
        raise RecipeError(*self.problems, Problem(what, self.place(event), fix))

    def count(self, event: Event, more: int = 1) -> None:
        """Count values, those behind an alias every time it is used."""
        self.values += more
        if self.values > MAX_VALUES:
            self.refuse(event, f"more than {MAX_VALUES:,} values", "A recipe is small; put rows into data files.")

    def compose(self, event: Event, origin: str, depth: int) -> Stated:
        """Build the value that starts with `event`."""
        if depth > MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} deep", "No recipe key lies that deep.")
        if isinstance(event, AliasEvent):
            return self.alias(event, origin)
        assert isinstance(event, NodeEvent)
        before = self.values
        self.count(event)
        tag = getattr(event, "tag", None)
        if tag is not None and str(tag) not in ("!", ""):
            self.problems.append(
                Problem(
                    f"the tag {str(tag)!r} is not allowed",
                    self.place(event),
                    "Write a plain value: a recipe makes no objects.",
                )
            )
        value = self.content(event, depth)
        stated = Stated(value, origin, self.folder)
        if event.anchor is not None:
            self.anchors[event.anchor] = stated
            self.sizes[event.anchor] = self.values - before
        return stated

    def content(self, event: NodeEvent, depth: int) -> dict[str, Stated] | list[Stated] | Scalar:
        """Build what a node holds."""
        if isinstance(event, MappingStartEvent):
            return self.mapping(depth)
        if isinstance(event, SequenceStartEvent):
            items: list[Stated] = []
            while not isinstance(item := next(self.events), SequenceEndEvent):
                items.append(self.compose(item, self.place(item), depth + 1))
            return items
        assert isinstance(event, ScalarEvent)
        return self.scalar(event)

    def alias(self, event: AliasEvent, origin: str) -> Stated:
        """Return the value of an anchor that is complete."""
        stated = self.anchors.get(event.anchor)
        if stated is None:
            self.refuse(event, f"the alias '*{event.anchor}' has no anchor before it", "Write the value out.")
        self.count(event, self.sizes[event.anchor])
        return Stated(stated.value, origin, stated.folder)

    def mapping(self, depth: int) -> dict[str, Stated]:
        """Build a mapping whose keys are text and stand once."""
        found: dict[str, Stated] = {}
        while not isinstance(key_event := next(self.events), MappingEndEvent):
            place = self.place(key_event)
            key = self.compose(key_event, place, depth + 1).value
            item = self.compose(next(self.events), place, depth + 1)
            if isinstance(key_event, ScalarEvent):
                key = key_event.value
            if not isinstance(key, str):
                self.problems.append(Problem("a key must be text", place, "Write `key: value`."))
            elif key == "<<" and getattr(key_event, "style", None) is None:
                self.problems.append(
                    Problem(
                        "merge keys (`<<`) are not part of YAML 1.2", place, "Use `extends` for a recipe to start from."
                    )
                )
            elif key in found:
                self.problems.append(
                    Problem(f"the key '{key}' stands twice (first: {found[key].origin})", place, "Keep one of them.")
                )
            else:
                found[key] = item
        return found

    def scalar(self, event: ScalarEvent) -> Scalar:
        """Give a scalar its value; a quoted one is text."""
        text: str = event.value
        if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
            self.problems.append(
                Problem("half a surrogate pair or a NUL is no text", self.place(event), "Write the character itself.")
            )
            return ""
        if event.style is not None:
            return text
        if len(text) > MAX_DIGITS and INT.fullmatch(text):
            self.problems.append(
                Problem(f"a number of {len(text)} digits", self.place(event), "Write a smaller number.")
            )
            return 0
        value = resolve_scalar(text)
        if isinstance(value, int) and abs(value) > MAX_INT:
            self.problems.append(Problem(f"{text} is too large", self.place(event), "Write a smaller number."))
            return 0
        return value


def parse_yaml(text: str, label: str, folder: Path, by_line: bool = True) -> Stated:
    """Read one YAML document; an empty one is None.

    `label` names the source in origins and errors; with `by_line` the line is added. Raises RecipeError.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError.of(
            f"more than {MAX_BYTES // 1024} KiB", label, "A recipe is small; put rows into data files."
        )
    events = YAML(typ="safe", pure=True).parse(text)
    composer = Composer(label, folder, events, by_line)
    root = Stated(None, f"{label}:1" if by_line else label, folder)
    try:
        documents = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    composer.refuse(event, "a second document", "A recipe is one document: remove what follows `---`.")
            elif isinstance(event, NodeEvent):
                root = composer.compose(event, root.origin, 0)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{label}:{mark.line + 1}" if by_line and mark is not None else label
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(
            *composer.problems, Problem(f"not valid YAML: {what}", place, "Mend the syntax at this line.")
        ) from None
    except (YAMLError, ValueError, OverflowError) as error:  # the last two: escapes beyond Unicode
        what = " ".join(str(error).split())
        raise RecipeError(
            *composer.problems, Problem(f"not valid YAML: {what}", label, "Remove what is not text.")
        ) from None
    RecipeError.collect(composer.problems)
    return root


def label(path: Path) -> str:
    """Return how a file is called in messages: relative to the working folder where it lies in it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def read_text(path: Path) -> str:
    """Read a recipe file as UTF-8. Raises RecipeError if it is missing, unreadable, too large or not UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError.of(
            "no such recipe file", label(path), "Check the path, or see `llmtune recipes list`."
        ) from None
    except IsADirectoryError:
        raise RecipeError.of("a folder, not a recipe file", label(path), "Name the YAML file in it.") from None
    except (OSError, ValueError) as error:
        raise RecipeError.of(f"cannot be read: {error}", label(path), "Check the path and its permissions.") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError.of(
            f"more than {MAX_BYTES // 1024} KiB", label(path), "A recipe is small; put rows into data files."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        byte = raw[error.start]
        raise RecipeError.of(
            f"not UTF-8 (byte 0x{byte:02x})", f"{label(path)}:{line}", "Save the file as UTF-8."
        ) from None
