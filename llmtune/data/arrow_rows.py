"""Rows from Arrow (Parquet, data sets on the hub), without the keys that Arrow filled in.

A struct column has one set of keys for all rows: those of every row together. A call of `add` gets `city: null`
because a call of `weather` has a city. Nothing marks those nulls, so every null key inside a column goes. Columns
themselves stay, and so do nulls in lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ArrowRow(dict[str, object]):
    """A row without the keys that Arrow filled in; `filled` counts them."""

    filled: int = 0


def drop_filled(row: Mapping[str, object], features: Mapping[str, object] | None = None) -> ArrowRow:
    """Return the row without the null keys inside its columns.

    `features` are those of the datasets library. Its type `Json` keeps rows as their author wrote them.
    """
    kept = ArrowRow()
    for column, value in row.items():
        kept[column], filled = _drop(value, (features or {}).get(column))
        kept.filled += filled
    return kept


def _drop(value: object, feature: Any) -> tuple[object, int]:
    """Return a value without the null keys of its structs, and how many those were."""
    if not isinstance(value, dict | list) or type(feature).__name__ == "Json":
        return value, 0
    if isinstance(value, list):
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
        parts = [_drop(one, inner) for one in value]
        return [one for one, _ in parts], sum(filled for _, filled in parts)
    of_key = feature if isinstance(feature, Mapping) else {}
    kept = {key: _drop(one, of_key.get(key)) for key, one in value.items() if one is not None}
    filled = len(value) - len(kept) + sum(inner for _, inner in kept.values())
    return {key: one for key, (one, _) in kept.items()}, filled
