"""Sentences on classes: names that were normalised or renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.recipe.class_names import show_name
from llmtune.report.number_format import count

SHOWN_NAMES = 8
"""How many changed names a sentence lists."""


def name_changes_sentences(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on the class names of rows that were normalised, and one on those that were renamed."""
    joined = {change["to"]: change["rows"] for change in changes if change["why"] == "joined"}
    sentences = []
    for why in ("normalised", "renamed"):
        some = [change for change in changes if change["why"] == why]
        if not some:
            continue
        listed = [
            f"{show_name(one['from'])} -> {show_name(one['to'])} ({count(one['rows'])})" for one in some[:SHOWN_NAMES]
        ]
        more = f" and {count(len(some) - SHOWN_NAMES)} more" if len(some) > SHOWN_NAMES else ""
        total = count(sum(one["rows"] for one in some))
        sentences.append(f"{total} class names were {why}: {', '.join(listed)}{more}.")
    new = {change["to"] for change in changes if change["why"] == "renamed"}
    for name in sorted(new & joined.keys()):
        sentences.append(f"{count(joined[name])} other rows have the class {show_name(name)}: they are one class now.")
    return sentences
