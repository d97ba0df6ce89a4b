"""What every section of a recipe is made of: a frozen, closed model and the few shapes that its values have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeGuard, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator

Item = TypeVar("Item")


class Section(BaseModel):
    """A part of the recipe: its keys are a closed list, its values are never converted and never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=False,
        protected_namespaces=(),
    )


def as_tuple(value: object) -> object:
    """Turn a list into a tuple and leave everything else to the validator."""
    return tuple(value) if isinstance(value, list) else value


def one_or_more(value: object) -> object:
    """Turn a single text or mapping into a tuple of one."""
    return (value,) if isinstance(value, str | Mapping) else as_tuple(value)


Many = Annotated[tuple[Item, ...], BeforeValidator(as_tuple)]
"""A list in the recipe, a tuple in Python."""


def is_section(annotation: object) -> TypeGuard[type[Section]]:
    """Whether a field's annotation is a section."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def by_kind(kinds: Mapping[type, str], otherwise: str) -> Discriminator:
    """Choose a branch of a union by the type of the value, so that an error speaks of one branch only."""

    def choose(value: Any) -> str:
        return next((tag for kind, tag in kinds.items() if isinstance(value, kind)), otherwise)

    chooser: Callable[[Any], str] = choose
    return Discriminator(chooser)


BRANCHES = ("share", "sources", "text", "items", "switch", "number")
"""Names of union branches: they stand in pydantic's locations, but not in a recipe."""
