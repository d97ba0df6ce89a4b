"""Sentences on classes: names that were normalised or renamed, and what changed since the champion."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune.display.number_format import count
from llmtune.recipe.class_names import show_name
from llmtune.recipe.yaml_writer import plain_or_quoted
from llmtune.store.score_records import ClassChanges

SHOWN_NAMES = 8
"""How many changed names a sentence lists."""


def list_class_changes(changes: ClassChanges, key: str) -> list[str]:
    """Return a sentence on the classes that are new, on those that are lost, and on each that may have a new name.

    `key` is the recipe key that renames classes.
    """
    new, sentences = [one.label for one in changes.new], []
    if new:
        sentences.append(f"Classes that the champion does not have: {_list_names(new)}.")
    if changes.lost:
        sentences.append(f"Classes of the champion without rows now: {_list_names(changes.lost)}.")
    for name, old, hits, rows in changes.hints:
        what = f"{show_name(name)} appeared as {show_name(old)} stopped, and the champion answers {show_name(old)} for "
        what += f"{hits} of {rows} of its rows: was it renamed?"
        sentences.append(f"{what} If so, set {key}: {{{plain_or_quoted(old)}: {plain_or_quoted(name)}}}.")
    return sentences


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(map(show_name, names[:SHOWN_NAMES])) + more


def class_reasons(changes: ClassChanges, worse: Sequence[str]) -> list[str]:
    """Return sentences for the verdict; `worse` are metrics that got worse on the rows of the champion's classes."""
    sentences = []
    if changes.known is not None and worse:
        what = f"On the {count(changes.known.rows)} rows of the champion's classes it is worse in "
        sentences.append(f"{what}{', '.join(metric.replace('_', ' ') for metric in worse)}.")
    for word in ("not learned", "too few rows"):
        if some := [one.label for one in changes.new if one.verdict == word]:
            sentences.append(f"New classes, {word}: {_list_names(some)}.")
    if changes.lost:
        sentences.append(f"Classes of the champion without rows now: {_list_names(changes.lost)}.")
    sentences += [f"{show_name(name)} may be the new name of {show_name(old)}." for name, old, *_ in changes.hints]
    return sentences
