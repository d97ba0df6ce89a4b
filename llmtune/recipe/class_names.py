"""Names of classes: one spelling for each, renames, and how messages show names that look the same."""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, Field

SAME_WAY = "Write it the same way in all rows."
OUTSIDE = "O"
"""The tag of a word outside entities."""
INVISIBLE = str.maketrans(dict.fromkeys("\u00ad\u200b\u200e\u200f\u2060\ufeff"))
"""Removes soft hyphens, zero-width blanks, direction marks, word joiners and byte order marks."""
JOINERS = "\u200c\u200d"
"""Zero-width joiners: part of the spelling in some scripts and in emoji, but not at the ends of a name."""


@lru_cache(maxsize=2**14)
def tidy_name(name: str) -> str:
    """Return a class name in NFC, with single blanks inside and none outside, and without invisible characters."""
    return " ".join(unicodedata.normalize("NFC", name.translate(INVISIBLE)).split()).strip(JOINERS)


def _require_name(name: str) -> str:
    if not (tidy := tidy_name(name)):
        raise ValueError("a class name needs a visible character")
    return tidy


ClassName = Annotated[str, Field(min_length=1), AfterValidator(_require_name)]
"""A class name in a recipe, in the same spelling as the labels of the rows."""


def spelling_key(name: str) -> str:
    """Return the form that class names share if they differ only by case, width, blanks or invisible characters."""
    wide = unicodedata.normalize("NFKC", tidy_name(name)).casefold()
    return tidy_name(unicodedata.normalize("NFKC", wide).translate(dict.fromkeys(map(ord, JOINERS))))


def similar_names(names: Iterable[str], distinct: Collection[str] = ()) -> list[list[str]]:
    """Return the groups of names with one `spelling_key`; the names in `distinct` are different by intention."""
    groups = defaultdict[str, list[str]](list)
    for name in sorted({*names}):
        groups[spelling_key(name)].append(name)
    return [group for group in groups.values() if len(group) > 1 and not {*group} <= {*distinct}]


def show_name(name: str) -> str:
    """Quote a name with escapes for letters that are invisible, or that look like others of another width or form."""
    composed = unicodedata.normalize("NFC", name) == name
    return f"'{''.join(_show_letter(letter, composed) for letter in name)}'"


def _show_letter(letter: str, composed: bool) -> str:
    plain = letter.isprintable() and unicodedata.normalize("NFKC", letter) == letter
    visible = plain and (composed or not unicodedata.combining(letter))
    return letter if visible else letter.encode("unicode_escape").decode()


def join_labels(labels: Sequence[str]) -> str:
    """Write labels with commas between them; as a JSON list if one has a comma."""
    return json.dumps([*labels], ensure_ascii=False) if "," in "".join(labels) else ", ".join(labels)


def follow_renames(rename: Mapping[str, str]) -> dict[str, str]:
    """Return the last name of each renamed class: with `a: b` and `b: c`, both become c.

    The result changes no name that it returns, so applying it twice is applying it once.
    """
    last: dict[str, str] = {}
    for old in rename:
        new, seen = rename[old], {old}
        while new in rename and new not in seen:
            seen.add(new)
            new = rename[new]
        last[old] = new
    return last


def find_cycle(rename: Mapping[str, str]) -> list[str]:
    """Return the names of a circle of renames, such as two that are swapped; empty if there is none."""
    for old in rename:
        path = [old]
        while (new := rename.get(path[-1])) is not None and new not in path:
            path.append(new)
        if new is not None:
            return path[path.index(new) :]
    return []


def rename_tag(tag: str, renames: Mapping[str, str]) -> str:
    """Return a tag in IOB2 with its entity type renamed."""
    return tag if tag == OUTSIDE else f"{tag[:2]}{renames.get(tag[2:], tag[2:])}"
