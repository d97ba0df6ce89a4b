"""Rows that can be read and look wrong: one question with several answers, and what spreadsheets write for no value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from llmtune.data.contamination import ANSWERS
from llmtune.data.row_hash import hash_content

MOST_ROWS = 100_000
"""Rows that are looked at: the memory of all their questions is bounded."""
LEARNED = (*ANSWERS, "label", "tags")
"""Keys of rows that hold what is learned."""
NO_VALUES = frozenset(
    ("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NULL!", "#NUM!", "N/A", "n/a", "nan", "NaN", "null", "NULL")
)
"""What Excel, pandas and databases write where there is no value."""


def suspicions(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for each kind of suspicious rows; `rows` are canonical, each with its origin, or an empty one.

    Looks at the first MOST_ROWS. Preferences and recordings repeat their prompts, so only empty values are looked for.
    """
    answered: dict[bytes, tuple[bytes, str]] = {}
    several: set[bytes] = set()
    pair = ("", "")
    empty: Counter[str] = Counter()
    for origin, row in islice(rows, MOST_ROWS):
        asked, answer = _split(row)
        for text in {text for text in _texts([asked, answer]) if text in NO_VALUES}:
            empty[text] += 1
        if "rejected" in row or "audio" in row or not any(_texts(asked)):
            continue
        key, said = hash_content({"asked": asked}), hash_content({"answer": answer})
        first, where = answered.setdefault(key, (said, origin))
        if first != said:
            pair = pair if several else (where, origin)
            several.add(key)
    found = [f"rows that hold {text!r}, which stands for no value: {count:,}" for text, count in empty.most_common()]
    if several:
        where = f", first in {pair[0]} and {pair[1]}" if all(pair) else ""
        found.append(f"questions with different answers in different rows: {len(several):,}{where}")
    return found


def _split(row: Mapping[str, Any]) -> tuple[object, object]:
    """Return what a row gives, and what is learned from it."""
    if "messages" in row:
        *before, last = row["messages"]
        return [one["content"] for one in before], {**last, "rest": [row.get(key) for key in LEARNED]}
    return {k: v for k, v in row.items() if k not in LEARNED}, {k: v for k, v in row.items() if k in LEARNED}


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a value, without outer white space."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
