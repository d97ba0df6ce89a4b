"""Scores by slice: the test rows apart by what a column says, and both models on each part.

A difference on a slice is about the rows of that slice alone, with an interval of its own. Shapes: N test rows,
Q inner edges.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llmtune.data import iterate_columns
from llmtune.errors import DataError, Problem, nearest
from llmtune.evaluate.metric import Measure, compare
from llmtune.evaluate.paired_statistics import unknown
from llmtune.records import Difference, Rows, Slice
from llmtune.report.verdict import FEWEST_ROWS

MOST_VALUES = 12
LONGEST_VALUE = 80
LONGEST_WHOLE = 1e12
OTHER, MISSING = "(other)", "(none)"
QUARTERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Parts:
    """The test rows apart by one column."""

    names: tuple[str, ...]
    """Of the slices: numbers and ranges of them upwards, else the most frequent first; what is left over last."""
    by_row: tuple[str, ...]
    """[N] the name of each row's slice."""


def read_slices(
    rows: Rows, columns: Sequence[str], wanted: Sequence[int], key: str = "evaluate.slices"
) -> dict[str, Parts]:
    """Take the `wanted` test rows (ascending numbers) apart by each column, which the recipe names in `key`.

    Raises DataError for columns that were not kept when the rows were prepared.
    """
    if not columns:
        return {}
    DataError.collect(
        Problem(
            f"the rows were prepared without their column {name!r}",
            key,
            f"{nearest(name, rows.columns)} Run the recipe again with it: the rows are read anew, and training, if "
            "nothing else has changed, is skipped.".strip(),
        )
        for name in columns
        if name not in rows.columns
    )
    chosen = frozenset(wanted)
    found = [values for number, values in enumerate(iterate_columns(rows, "test")) if number in chosen]
    return {name: take_apart([values.get(name) for values in found]) for name in columns}


def take_apart(values: Sequence[Any]) -> Parts:
    """Put each row into the slice of its value [N], of a range of numbers, or of the rest.

    Numbers of more than twelve values are put into four ranges of about as many rows each. Of other values the twelve
    most frequent stand alone.
    """
    names = [write_value(value) for value in values]
    known = [value for value in values if value is not None]
    numeric = all(map(is_number, known))
    if len({*names} - {MISSING}) > MOST_VALUES and numeric:
        edges_Q = sorted({float(edge) for edge in np.quantile(known, QUARTERS, method="lower")})
        ranges = name_ranges(edges_Q)
        names = [MISSING if value is None else ranges[int(np.searchsorted(edges_Q, value))] for value in values]
        return Parts(tuple(name for name in dict.fromkeys((*ranges, MISSING)) if name in names), tuple(names))
    counted = Counter(names)
    frequent = sorted(counted.keys() - {MISSING}, key=lambda name: (-counted[name], name))[:MOST_VALUES]
    if numeric:
        frequent.sort(key=float)
    names = [name if name in frequent or name == MISSING else OTHER for name in names]
    return Parts(tuple(name for name in (*frequent, OTHER, MISSING) if name in names), tuple(names))


def name_ranges(edges_Q: Sequence[float]) -> list[str]:
    """Name the Q + 1 ranges between inner edges, upwards; a range holds its upper end."""
    texts = [f"{edge:.0f}" if edge.is_integer() and abs(edge) < LONGEST_WHOLE else f"{edge:g}" for edge in edges_Q]
    inner = [f"above {low}, up to {high}" for low, high in pairwise(texts)]
    return [f"up to {texts[0]}", *inner, f"above {texts[-1]}"]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_value(value: Any) -> str:
    """Write a value on one line, shortened."""
    if value is None or value == "":
        return MISSING
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def score_slices(
    columns: Mapping[str, Parts], bases: Mapping[str, Measure], tunes: Mapping[str, Measure], seed: int
) -> dict[str, tuple[Slice, ...]]:
    """Score both models on every slice of every column."""
    return {
        column: tuple(
            score_slice(name, {row for row, own in enumerate(parts.by_row) if own == name}, bases, tunes, seed)
            for name in parts.names
        )
        for column, parts in columns.items()
    }


def score_slice(
    value: str, rows: set[int], bases: Mapping[str, Measure], tunes: Mapping[str, Measure], seed: int
) -> Slice:
    """Score both models on some rows, by index into the plan; a metric without any of them is left out."""
    base = {metric: found for metric, one in bases.items() if len((found := one.of(rows)).at)}
    tuned = {metric: found for metric, one in tunes.items() if len((found := one.of(rows)).at)}
    return Slice(
        value,
        len(rows),
        {metric: found.value for metric, found in base.items()},
        {metric: found.value for metric, found in tuned.items()},
        {metric: difference_of(base[metric], found, seed) for metric, found in tuned.items() if metric in base},
    )


def difference_of(base: Measure, tuned: Measure, seed: int) -> Difference:
    """Compare two models on a slice; without an interval where the rows are too few."""
    if len(tuned.at) < FEWEST_ROWS:
        return unknown(tuned.value - base.value, len(tuned.at))
    return compare(base, tuned, seed)
