"""Base class of all recipe sections, a frozen model without extra keys, and the types of their values."""

from __future__ import annotations

import ast
import glob
import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeGuard, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field

if TYPE_CHECKING:
    from llmtune.recipe.control_run import ControlRun

ItemT = TypeVar("ItemT")
REMOTE = ("hub:", "builtin:")
"""Prefixes of names that are not paths."""
STORES = ("s3://", "gs://", "https://", "http://")
"""URL prefixes of files in an object store or on a web server."""


class RecipeSection(BaseModel):
    """A section of the recipe. Unknown keys are refused; values are neither converted nor changed.

    The docstring of a key states its meaning, its unit and the reason for its default. The method `check` reports
    errors that types cannot express, such as a key without effect next to another one.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    paths: ClassVar[Mapping[str, Callable[[str, Path], str]]] = {}
    """Keys that contain paths -> the function that resolves them against the folder of the recipe file."""

    def as_control(self) -> ControlRun | None:
        """Return the control run that shows what this section is worth; None if the section has none."""
        return None


AnySection = TypeVar("AnySection", bound=RecipeSection)
ChangePath = Callable[[str, str, Callable[[str, Path], str]], str]
"""Maps a key, its path, and the function of `paths` that resolves it, to another path."""


def change_paths(section: AnySection, change: ChangePath, prefix: str = "") -> AnySection:
    """Return a section with each of its paths changed; keys of items in a list have an index, `data.train.0.path`."""
    update: dict[str, object] = {}
    for name, value in section:
        key, resolve = f"{prefix}{name}", type(section).paths.get(name)
        if isinstance(value, RecipeSection):
            update[name] = change_paths(value, change, f"{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], RecipeSection):
            update[name] = tuple(change_paths(item, change, f"{key}.{i}.") for i, item in enumerate(value))
        elif resolve and isinstance(value, tuple):
            update[name] = tuple(change(f"{key}.{i}", item, resolve) for i, item in enumerate(value))
        elif resolve and isinstance(value, Mapping):
            update[name] = {change(f"{key}.{path}", path, resolve): item for path, item in value.items()}
        elif resolve and isinstance(value, str):
            update[name] = change(key, value, resolve)
    return section.model_copy(update=update)


def absolute(path: str, folder: Path, pattern: bool = False) -> str:
    """Resolve `path` against `folder`; `~` is the home folder. With `pattern`, only `path` may be a glob."""
    path = os.path.expanduser(path)
    joined = os.path.join(folder, path)
    if pattern and glob.has_magic(path) and not os.path.lexists(joined) and not os.path.isabs(path):
        joined = os.path.join(glob.escape(str(folder)), path)
    normal = os.path.normpath(joined)
    return normal if os.path.realpath(normal) == os.path.realpath(joined) else joined  # keep `link/..`


RELEASE_PREFIX = "release:"
RELEASE_ADDRESS = re.compile(r"release:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(@(?P<hash>[0-9a-f]{8}))?")
"""`release:NAME`, the current release, or `release:NAME@HASH`."""


RUN_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[0-9a-f]{8})?")
"""`NAME`, the newest run of a recipe that passed its gates, or `NAME@HASH`."""


def absolute_or_address(path: str, folder: Path) -> str:
    """Resolve `path` as `absolute` does; leave the address of a release, or of a run if nothing has its name here."""
    is_run = RUN_ADDRESS.fullmatch(path) is not None and not os.path.lexists(os.path.join(folder, path))
    return path if is_run or path.startswith(RELEASE_PREFIX) else absolute(path, folder)


def is_folder(name: str, folder: Path) -> bool:
    """Return whether a model's name looks like a path or is an existing folder."""
    looks_local = name.startswith(("./", "../", "/", "~")) or name in (".", "..")
    return not name.startswith(REMOTE) and (looks_local or os.path.isdir(os.path.join(folder, name)))


def absolute_model(name: str, folder: Path) -> str:
    """Make a model folder absolute; return hub names unchanged."""
    return absolute(name, folder) if is_folder(name, folder) else name


def as_tuple(value: object) -> object:
    """Convert a list to a tuple; leave everything else to the validator."""
    return tuple(value) if isinstance(value, list) else value


def one_or_more(value: object) -> object:
    """Convert a single string or mapping to a tuple of one."""
    return (value,) if isinstance(value, str | Mapping) else as_tuple(value)


def sections_by(key: str) -> Callable[[object], object]:
    """Return a validator that converts one or more mappings to a tuple; a plain string is the value of `key`."""

    def as_sections(value: object) -> object:
        items = one_or_more(value)
        if not isinstance(items, tuple):
            return value
        return tuple({key: item} if isinstance(item, str) else item for item in items)

    return as_sections


Many = Annotated[tuple[ItemT, ...], BeforeValidator(as_tuple)]
"""A list in the recipe, a tuple in Python."""
NonEmpty = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def by_type(tags: Mapping[type, str], otherwise: str) -> Discriminator:
    """Choose the branch of a union by the type of the value; errors then name one branch only."""

    def choose(value: object) -> str:
        return next((tag for kind, tag in tags.items() if isinstance(value, kind)), otherwise)

    return Discriminator(choose)


BRANCHES = ("share", "sources", "text", "items", "switch", "number", "query")
"""Names of union branches. They appear in pydantic's error locations, but not in a recipe."""


def is_section(annotation: object) -> TypeGuard[type[RecipeSection]]:
    """Return whether a field's annotation is a section."""
    return isinstance(annotation, type) and issubclass(annotation, RecipeSection)


def find_section(annotation: object) -> type[RecipeSection] | None:
    """Return the section type within a field's annotation, if there is one."""
    if is_section(annotation):
        return annotation
    inner = (find_section(part) for part in typing.get_args(annotation))
    return next((section for section in inner if section), None)


def descriptions(section: type) -> dict[str, str]:
    """Return the docstring of each key on one line, parsed from the source.

    Empty if the source is not installed. Slow: call it only to show the texts.
    """
    try:
        (node,) = ast.parse(inspect.getsource(section)).body
    except OSError:
        return {}
    assert isinstance(node, ast.ClassDef)
    texts: dict[str, str] = {}
    for key, text in pairwise(node.body):
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(text, ast.Expr):
            texts[key.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return texts
