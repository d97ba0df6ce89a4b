"""What a task could read in a file whose columns have names of their own: inferred from its rows, and tried on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from llmtune.data.column_mapping import ALIASES, COMPARED, flatten, rename
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import detect_format, map_columns, parse_row
from llmtune.errors import DataError
from llmtune.recipe.data_section import Source
from llmtune.recipe.section import REMOTE
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.yaml_writer import scalar

RawRows = Sequence[Mapping[str, object]]
SMALLEST_SHARE = 0.5
"""Share of the rows that must be readable: a file may have bad rows."""
MANY_ROWS = 8
"""Fewer say nothing about what repeats."""
RECORDING = re.compile(r"\.(wav|flac|mp3|ogg|opus)$", re.IGNORECASE)


def infer_columns(rows: RawRows, task: str, folder: Path | None = None) -> dict[str, str] | None:
    """Return a mapping of columns by which `task` reads these rows; None where none that was tried does."""
    wanted = TASK_FACTS[task].columns
    if not wanted:
        return None
    rows = [flatten(row) for row in rows]
    known = {name for ours in wanted for name in (ours, *ALIASES.get(task, {}).get(ours, ()))}
    refused = () if wanted[-1] in COMPARED else COMPARED
    names = dict.fromkeys(name for row in rows for name in row if name.lower() not in refused)
    texts = [name for name in names if name.lower() in known or _is_text(rows, name)]
    if len(texts) < len(wanted):
        return None
    columns = _assign(rows, task, wanted, texts)
    return columns if columns and reads(rows, task, columns, folder) else None


def reads(rows: RawRows, task: str, columns: Mapping[str, str], folder: Path | None = None) -> bool:
    """Whether `task` reads at least half of these rows with `columns`."""
    try:
        row_format = detect_format(rows, task, columns, None, "")
    except DataError:
        return False
    mapping, good = map_columns(row_format, rows, task, columns), 0
    for row in rows:
        try:
            parse_row(rename(row, mapping), row_format, task, folder)
            good += 1
        except RowError:
            pass
    return good >= SMALLEST_SHARE * len(rows)


def _assign(rows: RawRows, task: str, wanted: Sequence[str], texts: Sequence[str]) -> dict[str, str] | None:
    """Give each wanted column the one that its name or its values speak for; what is left over joins the first."""
    left, columns = list(texts), dict[str, str]()
    for ours in reversed(wanted[1:]):
        named = _named(task, ours, left)
        if ours in COMPARED and not named:
            return None  # which of two answers is the better one cannot be seen
        columns[ours] = named[0] if named else _by_values(rows, ours, left)
        left.remove(columns[ours])
    if wanted[0] == "audio":
        left = [name for name in left if all(RECORDING.search(str(row.get(name))) for row in rows)]
    left = _named(task, wanted[0], left) or [name for name in left if not _repeats(rows, name)] or left
    if not left:
        return None
    joined = left if wanted[0] in ("prompt", "text", "document") else left[:1]
    given = joined[0] if len(joined) == 1 else "\n\n".join(f"{{{name}}}" for name in joined)
    return {wanted[0]: given, **{ours: columns[ours] for ours in wanted[1:]}}


def _by_values(rows: RawRows, ours: str, names: Sequence[str]) -> str:
    """Return the column whose values look like `ours`: classes repeat, a context is long, an answer stands last."""
    if ours == "label":
        return min(names, key=lambda name: len({str(row.get(name)) for row in rows}))
    if ours in ("context", "text"):
        return max(names, key=lambda name: mean(len(str(row.get(name) or "")) for row in rows))
    return next((name for name in reversed(names) if not _repeats(rows, name)), names[-1])


def _named(task: str, ours: str, names: Sequence[str]) -> list[str]:
    """Return the columns that are called so, or by a usual other name; else those with such a word in their names."""
    known = {ours, *ALIASES.get(task, {}).get(ours, ())}
    return [name for name in names if name.lower() in known] or [name for name in names if words(name) & known]


def words(name: str) -> set[str]:
    """Return the words of a column's name."""
    return set(re.findall(r"[a-z]+", name.lower()))


def _repeats(rows: RawRows, name: str) -> bool:
    """Whether a column has few values again and again, as a category does."""
    return len(rows) >= MANY_ROWS and len({str(row.get(name)) for row in rows}) <= len(rows) / 4


def _is_text(rows: RawRows, name: str) -> bool:
    """Whether a column holds words that differ from row to row; numbers, dates and identifiers are none."""
    values = [value for row in rows if isinstance(value := row.get(name), str) and value.strip()]
    if len(values) > 2 and len(set(values)) == 1:
        return False
    letters = [sum(sign.isalpha() or sign.isspace() for sign in value) / len(value) for value in values]
    return len(values) >= SMALLEST_SHARE * len(rows) and mean(letters) > SMALLEST_SHARE


def source_line(split: str, source: Source, **changes: object) -> str:
    """Return the line of a recipe for a source with some keys changed."""
    stated = source.model_dump(mode="json", exclude_defaults=True) | {"path": written_path(source.path)} | changes
    return f"{split}: {flow(stated)}"


def written_path(path: str) -> str:
    """Return how a source's path is written: relative where it lies below the working folder."""
    working = Path.cwd()
    below = not path.startswith(REMOTE) and Path(path).is_relative_to(working)
    return str(Path(path).relative_to(working)) if below else path


def flow(value: object) -> str:
    """Write a value on one line, with plain keys."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {flow(item)}' for key, item in value.items())}}}"
    return scalar(value)
