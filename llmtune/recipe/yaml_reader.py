"""Reads YAML 1.2 safely, with limits, into values that know their file and line.

Values follow the core schema of YAML 1.2.2 (section 10.3): `1e-4` is a number, `no` and dates are strings. Tags, merge
keys and duplicate keys are errors. Size, depth and the number of values (with aliases expanded) are limited.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ruamel.yaml import YAML, nodes
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, StreamMark, YAMLError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from llmtune.errors import Problem, RecipeError
from llmtune.recipe.user_files import read_bytes

MAX_BYTES = 256 * 1024
MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_DIGITS = 300
MAX_INT = 2**63 - 1

TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
YamlScalar = str | int | float | bool | None

NULL = re.compile(r"(?:null|Null|NULL|~|)")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
OLD_BOOL = re.compile(r"(?:yes|Yes|YES|on|On|ON)|(?:no|No|NO|off|Off|OFF)")
"""Further booleans of YAML 1.1."""
INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))")


@dataclass(frozen=True)
class Node:
    """A value and its origin: a mapping of nodes, a list of nodes, or a scalar."""

    value: dict[str, Node] | list[Node] | YamlScalar
    origin: str
    """`file:line` of its key or list item, or `--set`."""
    folder: Path
    """Base folder of relative paths in it."""
    overrides: bool = False
    """Whether it is a null that resets a value of the extended recipe."""

    def plain(self) -> object:
        """Return the value without origins."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


def resolve_scalar(text: str, old_booleans: bool = False) -> YamlScalar:
    """Return the value of a plain (unquoted) scalar by the core schema of YAML 1.2; booleans may be those of 1.1."""
    if old_booleans and OLD_BOOL.fullmatch(text):
        return text.lower() in ("yes", "on")
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


class PlainResolver(VersionedResolver):
    """Resolves no implicit types: a node's tag is always explicit, and `resolve_scalar` resolves plain values."""

    def resolve(self, kind: type[nodes.Node], value: str | None, implicit: object) -> Tag:
        """Return the default tag of this kind of node."""
        tag: Tag = super().resolve(kind, value, (False, False))
        return tag


class NodeReader:
    """Converts nodes of the YAML library to `Node`, and counts values."""

    def __init__(self, label: str, folder: Path, by_line: bool, old_booleans: bool = False) -> None:
        self.label = label
        self.folder = folder
        self.by_line = by_line
        self.old_booleans = old_booleans
        self.problems: list[Problem] = []
        self.values = 0

    def where(self, mark: StreamMark | None) -> str:
        """Return `file:line` of a mark, or only the label without `by_line`."""
        return f"{self.label}:{mark.line + 1}" if self.by_line and mark is not None else self.label

    def report(self, node: nodes.Node, what: str, fix: str) -> None:
        """Record a problem and continue."""
        self.problems.append(Problem(what, self.where(node.start_mark), fix))

    def read(self, node: nodes.Node, origin: str, depth: int = 0) -> Node:
        """Convert a node and its children; an aliased node is converted at every use."""
        self.values += 1
        if depth > MAX_DEPTH:
            self.report(node, f"nested more than {MAX_DEPTH} deep", "Remove it: no recipe key is that deep.")
            raise RecipeError(*self.problems)  # too deep to continue
        if self.values > MAX_VALUES:
            self.report(node, f"more than {MAX_VALUES:,} values", "Put rows in data files; recipes are small.")
            raise RecipeError(*self.problems)
        if node.tag not in TAGS:
            fix = "Write a plain value: recipes cannot create objects."
            self.report(node, f"the tag {node.tag!r} is not allowed", fix)
        if isinstance(node, nodes.MappingNode):
            return Node(self.mapping(node, depth), origin, self.folder)
        if isinstance(node, nodes.SequenceNode):
            items = [self.read(item, self.where(item.start_mark), depth + 1) for item in node.value]
            return Node(items, origin, self.folder)
        assert isinstance(node, nodes.ScalarNode)
        return Node(self.scalar(node), origin, self.folder)

    def mapping(self, node: nodes.MappingNode, depth: int) -> dict[str, Node]:
        """Convert a mapping; report keys that are not strings or not unique."""
        items: dict[str, Node] = {}
        for key, value in node.value:
            origin = self.where(key.start_mark)
            self.read(key, origin, depth + 1)
            item = self.read(value, origin, depth + 1)
            name = key.value
            if not isinstance(key, nodes.ScalarNode):
                self.report(key, "a key is not text", "Write `key: value`.")
            elif name == "<<" and key.style is None:
                fix = "Use `extends` to inherit from a recipe."
                self.report(key, "merge keys (`<<`) are not part of YAML 1.2", fix)
            elif name in items:
                what = f"duplicate key '{name}' (first: {items[name].origin})"
                self.report(key, what, "Keep one of them.")
            else:
                items[name] = item
        return items

    def scalar(self, node: nodes.ScalarNode) -> YamlScalar:
        """Return a scalar's value; a quoted scalar is a string."""
        text: str = node.value
        if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
            self.report(node, "half a surrogate pair or a NUL is not text", "Write the character itself.")
            return ""
        if node.style is not None:
            return text
        if len(text) > MAX_DIGITS and INT.fullmatch(text):
            self.report(node, f"a number of {len(text)} digits", "Write a smaller number.")
            return 0
        value = resolve_scalar(text, self.old_booleans)
        if isinstance(value, int) and abs(value) > MAX_INT:
            self.report(node, f"{text} is too large", "Write a smaller number.")
            return 0
        return value


def parse_yaml(text: str, label: str, folder: Path, by_line: bool = True, *, old_booleans: bool = False) -> Node:
    """Parse one YAML document; an empty document is None.

    `label` names the source in origins and errors; with `by_line` the line is added. With `old_booleans`, `yes`,
    `no`, `on` and `off` are booleans, as in YAML 1.1. Raises RecipeError.
    """
    check_size(len(text.encode("utf-8", "surrogatepass")), label)
    reader = NodeReader(label, folder, by_line, old_booleans)
    try:
        root = _compose(text)
    except ReusedAnchorWarning as warning:
        what = str(warning).strip().splitlines()[0]
        raise RecipeError.of(f"not valid YAML: {what}", label, "Use a different name for each anchor.") from None
    except MarkedYAMLError as error:
        what = " ".join(part for part in (error.context, error.problem) if part)
        where = reader.where(error.problem_mark or error.context_mark)
        raise RecipeError.of(f"not valid YAML: {what}", where, "Fix the syntax at this line.") from None
    except RecursionError:
        fix = "Remove it: no recipe key is that deep."
        raise RecipeError.of(f"nested more than {MAX_DEPTH} deep", label, fix) from None
    except (YAMLError, ValueError, OverflowError) as error:  # the last two: escapes beyond Unicode
        what = " ".join(str(error).split())
        raise RecipeError.of(f"not valid YAML: {what}", label, "Remove characters that are not text.") from None
    origin = f"{label}:1" if by_line else label
    node = Node(None, origin, folder) if root is None else reader.read(root, origin)
    RecipeError.collect(reader.problems)
    return node


@lru_cache(maxsize=4)  # a run reads its recipe five times
def _compose(text: str) -> nodes.Node | None:
    """Return the nodes of a YAML document; a `NodeReader` does not change them."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = PlainResolver
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReusedAnchorWarning)
        root: nodes.Node | None = yaml.compose(text)
        return root


def check_size(size_bytes: int, label: str) -> None:
    """Raise RecipeError if a recipe's text is too large."""
    if size_bytes > MAX_BYTES:
        fix = "Put rows in data files; recipes are small."
        raise RecipeError.of(f"more than {MAX_BYTES // 1024} KiB", label, fix)


def file_label(path: Path) -> str:
    """Return a file's name for messages, relative to the working folder if it is inside it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def read_recipe_text(path: Path) -> str:
    """Read a recipe file as UTF-8. Raises RecipeError if it is missing, unreadable, too large or not UTF-8."""
    name = file_label(path)
    try:
        raw = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        fix = "Check the path, or see `llmtune recipes list`."
        raise RecipeError.of("recipe file not found", name, fix) from None
    except OSError as error:
        if error.errno == errno.EFBIG:
            check_size(MAX_BYTES + 1, name)
        fix = "Check the path and its permissions."
        raise RecipeError.of(f"cannot be read: {error.strerror}", name, fix) from None
    except ValueError as error:
        raise RecipeError.of(f"cannot be read: {error}", name, "Check the path.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{name}:{raw.count(bytes([10]), 0, error.start) + 1}"
        raise RecipeError.of(f"not UTF-8 (byte 0x{raw[error.start]:02x})", where, "Save the file as UTF-8.") from None
