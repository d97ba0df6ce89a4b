"""Reads YAML text into values that know where they stand; safe, bounded, YAML 1.2.

Values follow the core schema of YAML 1.2.2 (section 10.3): `1e-4` is a number, `no` and dates are text. Tags, merge
keys and duplicate keys are refused; size, depth and the number of values (aliases expanded) are bounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

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
class Node:
    """A value and where it stands: mappings hold nodes by key, lists hold nodes, everything else is a scalar."""

    value: dict[str, Node] | list[Node] | Scalar
    origin: str
    """`file:line` of its key or list item, or `--set`."""
    folder: Path
    """What paths in it are relative to."""
    overrides: bool = False
    """Whether it is a null that takes back what a recipe below states."""

    def plain(self) -> object:
        """Return the value without origins."""
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


class Composer:
    """Builds nodes out of parser events, counting as it goes."""

    def __init__(self, label: str, folder: Path, events: Iterator[Event], by_line: bool) -> None:
        self.label = label
        self.folder = folder
        self.events = events
        self.by_line = by_line
        self.problems: list[Problem] = []
        self.anchors: dict[str, tuple[Node, int]] = {}
        """By anchor, its node and how many values are in it."""
        self.values = 0

    def origin(self, event: Event) -> str:
        """Return `file:line` of an event, or the label alone where lines mean nothing."""
        return f"{self.label}:{event.start_mark.line + 1}" if self.by_line else self.label

    def report(self, event: Event, what: str, fix: str) -> None:
        """Note a problem and read on."""
        self.problems.append(Problem(what, self.origin(event), fix))

    def refuse(self, event: Event, what: str, fix: str) -> NoReturn:
        """Stop reading: what follows cannot be trusted."""
        self.report(event, what, fix)
        raise RecipeError(*self.problems)

    def count(self, event: Event, more: int = 1) -> None:
        """Count values, those behind an alias every time it is used."""
        self.values += more
        if self.values > MAX_VALUES:
            self.refuse(event, f"more than {MAX_VALUES:,} values", "A recipe is small; put rows into data files.")

    def compose(self, event: Event, origin: str, depth: int) -> Node:
        """Build the value that starts with `event`."""
        if depth > MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} deep", "No recipe key lies that deep.")
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                self.refuse(event, f"the alias '*{event.anchor}' has no anchor before it", "Write the value out.")
            target, size = self.anchors[event.anchor]
            self.count(event, size)
            return Node(target.value, origin, target.folder)
        assert isinstance(event, NodeEvent)
        before = self.values
        self.count(event)
        tag = getattr(event, "tag", None)
        if tag is not None and str(tag) not in ("!", ""):
            fix = "Write a plain value: a recipe makes no objects."
            self.report(event, f"the tag {str(tag)!r} is not allowed", fix)
        node = Node(self.content(event, depth), origin, self.folder)
        if event.anchor is not None:
            self.anchors[event.anchor] = node, self.values - before
        return node

    def content(self, event: NodeEvent, depth: int) -> dict[str, Node] | list[Node] | Scalar:
        """Build what a node holds."""
        if isinstance(event, MappingStartEvent):
            return self.mapping(depth)
        if isinstance(event, SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(item := next(self.events), SequenceEndEvent):
                items.append(self.compose(item, self.origin(item), depth + 1))
            return items
        assert isinstance(event, ScalarEvent)
        return self.scalar(event)

    def mapping(self, depth: int) -> dict[str, Node]:
        """Build a mapping whose keys are text and stand once."""
        items: dict[str, Node] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            origin = self.origin(event)
            key = self.compose(event, origin, depth + 1).value
            item = self.compose(next(self.events), origin, depth + 1)
            if isinstance(event, ScalarEvent):
                key = event.value
            if not isinstance(key, str):
                self.report(event, "a key must be text", "Write `key: value`.")
            elif key == "<<" and getattr(event, "style", None) is None:
                fix = "Use `extends` for a recipe to start from."
                self.report(event, "merge keys (`<<`) are not part of YAML 1.2", fix)
            elif key in items:
                what = f"the key '{key}' stands twice (first: {items[key].origin})"
                self.report(event, what, "Keep one of them.")
            else:
                items[key] = item
        return items

    def scalar(self, event: ScalarEvent) -> Scalar:
        """Give a scalar its value; a quoted one is text."""
        text: str = event.value
        if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
            self.report(event, "half a surrogate pair or a NUL is no text", "Write the character itself.")
            return ""
        if event.style is not None:
            return text
        if len(text) > MAX_DIGITS and INT.fullmatch(text):
            self.report(event, f"a number of {len(text)} digits", "Write a smaller number.")
            return 0
        value = resolve_scalar(text)
        if isinstance(value, int) and abs(value) > MAX_INT:
            self.report(event, f"{text} is too large", "Write a smaller number.")
            return 0
        return value


def parse_yaml(text: str, label: str, folder: Path, by_line: bool = True) -> Node:
    """Read one YAML document; an empty one is None.

    `label` names the source in origins and errors; with `by_line` the line is added. Raises RecipeError.
    """
    check_size(len(text.encode("utf-8", "surrogatepass")), label)
    events = YAML(typ="safe", pure=True).parse(text)
    composer = Composer(label, folder, events, by_line)
    root = Node(None, f"{label}:1" if by_line else label, folder)
    documents = 0
    try:
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    composer.refuse(event, "a second document", "A recipe is one document: remove what follows `---`.")
            elif isinstance(event, NodeEvent):
                root = composer.compose(event, root.origin, 0)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if by_line and mark is not None else label
        what = " ".join(part for part in (error.context, error.problem) if part)
        problem = Problem(f"not valid YAML: {what}", where, "Mend the syntax at this line.")
        raise RecipeError(*composer.problems, problem) from None
    except (YAMLError, ValueError, OverflowError) as error:  # the last two: escapes beyond Unicode
        problem = Problem(f"not valid YAML: {' '.join(str(error).split())}", label, "Remove what is not text.")
        raise RecipeError(*composer.problems, problem) from None
    RecipeError.collect(composer.problems)
    return root


def check_size(size_bytes: int, label: str) -> None:
    """Raise RecipeError if a text is too large for a recipe."""
    if size_bytes > MAX_BYTES:
        fix = "A recipe is small; put rows into data files."
        raise RecipeError.of(f"more than {MAX_BYTES // 1024} KiB", label, fix)


def label(path: Path) -> str:
    """Return how a file is called in messages: relative to the working folder where it lies in it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def read_text(path: Path) -> str:
    """Read a recipe file as UTF-8. Raises RecipeError if it is missing, unreadable, too large or not UTF-8."""
    name = label(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        fix = "Check the path, or see `llmtune recipes list`."
        raise RecipeError.of("no such recipe file", name, fix) from None
    except IsADirectoryError:
        raise RecipeError.of("a folder, not a recipe file", name, "Name the YAML file in it.") from None
    except (OSError, ValueError) as error:
        raise RecipeError.of(f"cannot be read: {error}", name, "Check the path and its permissions.") from None
    check_size(len(raw), name)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{name}:{raw.count(bytes([10]), 0, error.start) + 1}"
        raise RecipeError.of(f"not UTF-8 (byte 0x{raw[error.start]:02x})", where, "Save the file as UTF-8.") from None
