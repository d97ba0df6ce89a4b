"""Scores by slice: the test rows split by a column's values, and both models' scores on each part.

A slice's difference covers only its own rows, with its own interval. Shapes: N test rows,
Q inner edges.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from itertools import pairwise
from typing import TypeVar

import numpy as np

from llmtune.data.row_hash import DECIMAL, plain_value
from llmtune.data.row_store import iterate_columns
from llmtune.data.row_text import text_key
from llmtune.data.written_numbers import read_numbers
from llmtune.errors import DataError, Problem, nearest
from llmtune.evaluate.metric import PairedMeasures
from llmtune.records import FEWEST_ROWS, Rows
from llmtune.store.atomic_files import hash_value
from llmtune.store.score_records import Slice

MOST_VALUES = 12
LONGEST_VALUE = 80
LONGEST_WHOLE = 1e12
OTHER, MISSING = "(other)", "(none)"
NO_DIGIT = re.compile(r"[^0-9]")
QUARTERS = (0.25, 0.5, 0.75)
Name = TypeVar("Name", int, str)
Parts = Mapping[str, Set[int]]
"""The test rows split by one column: row indexes of each slice, by slice name.

Numbers and ranges are in ascending order, other values by frequency; the rest comes last."""


def read_slices(
    rows: Rows, columns: Sequence[str], numbers: Sequence[int], key: str = "evaluate.slices"
) -> dict[str, Parts]:
    """Split the test rows with these ascending `numbers` by each column that the recipe lists in `key`.

    Raises DataError for columns that preparation did not keep.
    """
    if not columns:
        return {}
    DataError.collect(
        Problem(
            f"the rows were prepared without their column {name!r}",
            key,
            f"{nearest(name, rows.columns)} Run the recipe again with it: the rows are read again, and training, if "
            "nothing else has changed, is skipped.".strip(),
        )
        for name in columns
        if name not in rows.columns
    )
    chosen = frozenset(numbers)
    cells = [values for number, values in enumerate(iterate_columns(rows, "test")) if number in chosen]
    return {name: split_by_value([values.get(name) for values in cells]) for name in columns}


def split_by_value(values: Sequence[object]) -> Parts:
    """Put each row into the slice of its value [N], of a range of numbers, or of other values.

    More than twelve different numbers are put into four ranges with about as many rows each. Of other values the
    twelve most frequent get a slice each. A table's text is a number too, with a decimal point or a decimal comma,
    unless texts with different digits are one number: versions 1.1 and 1.10.
    """
    numbers = read_numbers(values)
    written = {
        (n, NO_DIGIT.sub("", text)) for n, text in zip(numbers or (), values, strict=False) if isinstance(text, str)
    }
    if len({number for number, _ in written}) < len(written) <= MOST_VALUES:
        numbers = None
    names = name_values(values if numbers is None else numbers)
    if numbers is not None and len({*names} - {MISSING}) > MOST_VALUES:
        edges_Q = sorted(
            {float(edge) for edge in np.quantile([n for n in numbers if n is not None], QUARTERS, method="lower")}
        )
        order = name_ranges(edges_Q)
        names = [MISSING if number is None else order[int(np.searchsorted(edges_Q, number))] for number in numbers]
    else:
        counted = Counter(names)
        order = sorted(counted.keys() - {MISSING}, key=lambda name: (-counted[name], name))[:MOST_VALUES]
        if numbers is not None:
            order.sort(key=float)
        names = [name if name in order or name == MISSING else OTHER for name in names]
    rows = rows_by(names)
    return {name: rows[name] for name in dict.fromkeys((*order, OTHER, MISSING)) if name in rows}


def name_ranges(edges_Q: Sequence[float]) -> list[str]:
    """Name the Q + 1 ranges between inner edges, in ascending order; a range includes its upper end."""
    digits = next((n for n in range(6, 17) if len({f"{edge:.{n}g}" for edge in edges_Q}) == len(edges_Q)), 17)
    texts = [
        f"{edge:.0f}" if edge.is_integer() and abs(edge) < LONGEST_WHOLE else f"{edge:.{digits}g}" for edge in edges_Q
    ]
    inner = [f"above {low}, up to {high}" for low, high in pairwise(texts)]
    return [f"up to {texts[0]}", *inner, f"above {texts[-1]}"]


def name_values(values: Sequence[object]) -> list[str]:
    """Write each value on one line, shortened.

    Different values with the same short text get their hash as well; the names of other and missing values, quotes.
    """
    keys = [text_key(value) if isinstance(value, str) else "" for value in values]
    texts = [key if DECIMAL.fullmatch(key) else plain_value(value) for key, value in zip(keys, values, strict=True)]
    lines = {text: one_line(text, LONGEST_VALUE) for text in texts}
    lines = {text: repr(line) if line in (OTHER, MISSING) else line for text, line in lines.items()}
    shared = Counter(lines.values())
    names = {text: f"{line} ({hash_value(text)[:6]})" if shared[line] > 1 else line for text, line in lines.items()}
    return [names[text] if lines[text] else MISSING for text in texts]


def one_line(text: str, longest: int) -> str:
    """Write a text on one line, cut to `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def rows_by(names: Iterable[Name]) -> dict[Name, set[int]]:
    """Return the rows of each name, in the order in which names first appear."""
    rows: dict[Name, set[int]] = {}
    for number, name in enumerate(names):
        rows.setdefault(name, set()).add(number)
    return rows


def score_slices(columns: Mapping[str, Parts], measures: PairedMeasures, seed: int) -> dict[str, tuple[Slice, ...]]:
    """Score both models on every slice of every column."""
    return {
        column: tuple(score_slice(name, rows, measures, seed) for name, rows in parts.items())
        for column, parts in columns.items()
    }


def score_slice(value: str, rows: Collection[int], measures: PairedMeasures, seed: int) -> Slice:
    """Score both models on some rows, by index; metrics without any of them are dropped."""
    part = measures.subset(rows)
    return Slice(value, len(rows), *part.scores(), part.differences(seed, FEWEST_ROWS))
