"""Rows that cannot be used: the reason of each, and the list of them beside the folder that a step replaces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

Add = Callable[[dict[str, str]], None]

ANSWER_COLUMNS = ("completion", "output", "target", "summary", "chosen", "rejected")


class RowError(Exception):
    """A bad row: `reason` is the kind of mistake, by which rows are counted; `detail` is what exactly is wrong."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def describe(value: object) -> str:
    """Name the kind of a JSON value, as a person would."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def text_of(value: object, what: str) -> str:
    """Return `value` if it is text.

    Raises:
        RowError: It is something else.
    """
    if not isinstance(value, str):
        raise RowError("wrong type", f"{what} is {describe(value)}; it must be text")
    return value


def nonempty_text(row: Mapping[str, object], column: str) -> str:
    """Return the text of a column that must not be empty; raises RowError."""
    value = row.get(column)
    text = "" if value is None else text_of(value, f"'{column}'")
    if not text.strip():
        raise RowError("no answer" if column in ANSWER_COLUMNS else "empty content", f"'{column}' is empty")
    return text


@contextmanager
def listed(path: Path) -> Iterator[Add]:
    """Give a function that adds a line; the list takes its name at the end, and an old one goes if there is nothing.

    A list that was not ended, because an error passed through, is thrown away, and the old one stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    file: IO[str] | None = None

    def add(entry: dict[str, str]) -> None:
        nonlocal file
        if file is None:
            file = partial.open("w", encoding="utf-8", errors="backslashreplace")
        file.write(json.dumps(entry) + "\n")

    try:
        yield add
        if file is None:
            path.unlink(missing_ok=True)
        else:
            file.close()
            partial.replace(path)
    finally:
        if file is not None:
            file.close()
        partial.unlink(missing_ok=True)
