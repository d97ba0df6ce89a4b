"""Class names in rows: normalised and renamed with a count, and refused if they differ only by case or width."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.data.rejected_rows import parse_cell
from llmtune.data.row_kind import names_in, rename_row
from llmtune.data.written_numbers import PLAIN
from llmtune.errors import DataError, Problem, nearest, read_origin
from llmtune.recipe.class_names import SAME_WAY, show_name, similar_names, tidy_name
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.yaml_writer import plain_or_quoted
from llmtune.records import Json, Row

NoteName = Callable[[str, str], object]
"""Receives a class name as it is in the file, and as it is used."""
NameChange = tuple[str, str, str]
"""`NORMALISED` or `RENAMED`, the name before, and after; `JOINED` with a name that another class gets."""
NORMALISED, RENAMED, JOINED = "normalised", "renamed", "joined"
NAMED = ("labels", "tags")
"""Kinds of answers whose recipe section lists and renames classes."""
SHOWN_FILES = 3


def tidy_cell(cell: object, note: NoteName) -> object:
    """Return a cell with its class names in the usual form; a list may be JSON text, and a span has a `label`."""
    parsed = parse_cell(cell)
    if isinstance(parsed, list):
        return [tidy_cell(item, note) for item in parsed]
    if isinstance(cell, dict):
        return {key: tidy_cell(value, note) if key == "label" else value for key, value in cell.items()}
    if not isinstance(cell, str):
        return cell
    if (name := tidy_name(cell)) != cell:
        note(cell, name)
    return name


def note_tidied(changes: dict[NameChange, None]) -> NoteName:
    """Return the function that adds normalised names to the changes of a row."""
    return lambda written, name: changes.setdefault((NORMALISED, written, name))


def rename_classes(row: Row, renames: Mapping[str, str], changes: dict[NameChange, None]) -> Row:
    """Return a canonical row with its classes renamed, and add them to the changes of the row."""
    names = names_in(row) if renames else []
    changes |= {(JOINED, name, name): None for name in names if name in renames.values()}
    changes |= {(RENAMED, name, renames[name]): None for name in names if name in renames}
    return rename_row(row, renames) if any(name in renames for name in names) else row


def list_changes(counts: Mapping[NameChange, int]) -> list[Json]:
    """Return the changes of class names with their numbers of rows, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"why": why, "from": old, "to": new, "rows": rows} for (why, old, new), rows in ordered]


def warn_of_idle_renames(
    renames: Mapping[str, str], changes: Iterable[Json], earlier: Iterable[str], current: Iterable[str]
) -> list[str]:
    """Return a sentence for each rename of a class that no row has, nor an earlier run with these class names."""
    used = {*earlier, *(change["from"] for change in changes if change["why"] == RENAMED)}
    names = [name for name in dict.fromkeys([*used, *current]) if name not in renames]
    idle = [old for old in renames if old not in used]
    if len(idle) > 1:
        return [f"rename: no row has the classes {', '.join(map(show_name, idle))}. Remove those that are done."]
    return [
        f"rename: no row has the class {show_name(old)}.{nearest(old, names)} Remove it if it is done." for old in idle
    ]


def propose_renames(counts: Mapping[str, int], distinct: Collection[str] = ()) -> dict[str, str]:
    """Return the renames that give each class its most frequent spelling; the names in `distinct` are classes."""
    words = [name for name in counts if not PLAIN.fullmatch(name)]
    groups = [sorted(group, key=lambda name: (-counts[name], name)) for group in similar_names(words, distinct)]
    return {name: best for best, *others in groups for name in others}


def write_renames(renames: Mapping[str, str]) -> str:
    """Write renames for the recipe."""
    return f"{{{', '.join(f'{_in_yaml(old)}: {_in_yaml(new)}' for old, new in renames.items())}}}"


@dataclass
class Spelling:
    """The rows with one class name."""

    files: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """By file, the first row."""

    def describe(self, name: str) -> str:
        """Return the name with its rows by file, and the first line of each."""
        places = [
            f"{Path(file).name} {rows:,}, first in {Path(self.first[file]).name}"
            for file, rows in self.files.most_common(SHOWN_FILES)
        ]
        more = f"; {len(self.files) - SHOWN_FILES} more files" if len(self.files) > SHOWN_FILES else ""
        rows = self.files.total()
        return f"{show_name(name)}: {rows:,} row{'s' if rows != 1 else ''} ({'; '.join(places)}{more})"


def require_one_spelling(rows: Iterable[tuple[str, Row]], recipe: Recipe) -> list[str]:
    """Return the class names in (origin, row); refuse names that differ only by case, width or invisible characters.

    Names that the recipe lists as labels are different classes.

    Raises:
        DataError: One problem for each group of names, with the rows of each.
    """
    spellings, problems = defaultdict[str, Spelling](Spelling), list[Problem]()
    for origin, row in rows:
        file = read_origin(origin)[0]
        for name in names_in(row):
            spellings[name].files[file] += 1
            spellings[name].first.setdefault(file, origin)
    facts = TASK_FACTS[recipe.task]
    key = facts.section if facts.answer_kind in NAMED else None
    renames = propose_renames({name: one.files.total() for name, one in spellings.items()}, recipe.classes)
    groups = [[best, *(old for old in renames if renames[old] == best)] for best in dict.fromkeys(renames.values())]
    fix = SAME_WAY
    if key is not None:
        fix = f"{SAME_WAY.rstrip('.')}, or set {key}.rename: {write_renames(renames)}. "
        fix += f"If they are different classes, list both in {key}.labels."
    for group in groups:
        listed = "; ".join(spellings[name].describe(name) for name in group)
        what = f"one class in several spellings: {listed}"
        problems.append(Problem(what, key and f"{key}.labels", fix if group is groups[-1] else None))
    DataError.collect(problems)
    return [*spellings]


def _in_yaml(name: str) -> str:
    """Write a name for the recipe; letters that show nothing get the escapes of YAML's double quotes."""
    shown = show_name(name)[1:-1]
    return plain_or_quoted(name) if shown == name else f'"{shown}"'
