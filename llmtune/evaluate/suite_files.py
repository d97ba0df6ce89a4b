"""Files that suites read besides the rows, with everything that is wrong in them told at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TypeVar

from llmtune.data.file_readers import explained, open_bytes
from llmtune.errors import DataError, Problem

OWN_FILES = resources.files("llmtune.evaluate")
"""What comes with llmtune: `general` and `groups`."""
MOST_SHOWN = 20
"""Problems that are named; more are counted."""
Item = TypeVar("Item")


def read_sources(
    sources: Sequence[str], read: Callable[[str], Sequence[Item | Problem]], kind: str, fix: str
) -> list[Item]:
    """Read items of a `kind` from all sources; `read` gives the items of one, and a Problem for each bad one.

    Raises DataError for sources that cannot be read, hold a bad item, or hold none.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            parts = read(source)
        except DataError as error:
            problems += error.problems
            continue
        bad = [part for part in parts if isinstance(part, Problem)]
        items += [part for part in parts if not isinstance(part, Problem)]
        problems += bad if parts else [Problem(f"there is no {kind} in it", source, fix)]
    if len(problems) > MOST_SHOWN:
        problems[MOST_SHOWN:] = [Problem(f"{len(problems) - MOST_SHOWN} more problems like these")]
    DataError.collect(problems)
    return items


def read_utf8(path: Path, fix: str) -> str:
    """Read a text file, which may be compressed. Raises DataError where it is missing or not UTF-8."""
    if not path.is_file():
        raise DataError.of("there is no such file", str(path), fix)
    with explained(str(path)), open_bytes(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8: byte {content[error.start]:#04x}"
        raise DataError.of(what, f"{path}:{line}", "Save the file as UTF-8.") from error
