"""The first line of a table: the names of its columns, or a title above them, as people write in spreadsheets."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence

from llmtune.data.written_numbers import read_number
from llmtune.errors import DataError

LOOKED_AT = 20
"""How many lines are searched for the names of the columns."""
NAME_CHARACTERS = 60
HEADER = "The first line must have the names of the columns. "
DELIMITERS = ",;\t|"


def refuse_title(lines: Sequence[Sequence[str]], where: str) -> None:
    """Raise DataError if the first of a table's lines is a title or a merged header, with the line of the names."""
    widths = Counter(len(cells) for cells in lines if len(cells) > 1)
    width, number = widths.most_common(1)[0] if widths else (0, 0)
    first = lines[0] if lines else ()
    empty = len(first) - sum(map(bool, map(str.strip, first)))
    is_title = 2 * empty > len(first) or (2 * empty == len(first) and any(first[:1]))
    if number <= len(lines) / 2 or not (is_title if len(first) > 1 else first):
        return
    found = next((line for line, cells in enumerate(lines, 1) if len(cells) == width and _are_names(cells)), None)
    if found or len(first) > 1:
        title = " ".join(" ".join(first).split())
        fix = "Remove the lines above it."
        if found:
            fix = f"Line {found} seems to have them: {', '.join(lines[found - 1])}. Remove the lines above it."
        what = f"the first line is a title or a merged header, not the names of the columns: {title!r}"
        raise DataError.of(what, where, f"{HEADER}{fix}")


def _are_names(cells: Sequence[str]) -> bool:
    names = [cell.strip() for cell in cells]
    is_short = all(name and len(name) <= NAME_CHARACTERS and read_number(name) is None for name in names)
    return is_short and len({*names}) == len(names)


def split_lines(lines: Sequence[str]) -> list[list[str]]:
    """Return the cells of a file's first lines, by the delimiter that most lines have; none if a cell is too long."""
    try:
        tables = [[*csv.reader(lines, delimiter=delimiter)] for delimiter in DELIMITERS]
    except csv.Error:
        return []  # reading the rows refuses it with its line
    return max(tables, key=lambda table: sum(len(cells) > 1 for cells in table))
