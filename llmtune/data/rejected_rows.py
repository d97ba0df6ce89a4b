"""Unusable rows: the reason for each, and their list next to the folder that a step replaces."""

from __future__ import annotations

import ast
import io
import json
import math
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from llmtune.errors import Problem
from llmtune.store.atomic_files import atomic_file

MOST_LITERAL = 2**20
"""Longest text that is parsed as a Python literal: the parser needs a hundred times its size."""
NO_VALUES = frozenset(
    ("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NULL!", "#NUM!", "N/A", "n/a", "nan", "NaN", "null", "NULL")
)
"""Placeholders that Excel, pandas and databases write for missing values."""
MOST_DROPPED = 0.25
"""The largest share of bad rows that a message proposes to accept."""
ANSWER_COLUMNS = ("completion", "output", "target", "summary", "chosen", "rejected")


class RowError(Exception):
    """A bad row: `reason` is the kind of mistake under which it is counted; `detail` is the exact mistake."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def json_kind(value: object) -> str:
    """Return the kind of a JSON value in plain words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def parse_cell(value: object) -> object:
    """Parse a list or object that a table has as JSON text or as Python writes it; return any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
        if len(value) <= MOST_LITERAL:
            return _parse_literal(value)
    return value


def _parse_literal(text: str) -> object:
    """Parse a Python list or dict; return any other text unchanged.

    NumPy writes `['a' 'b']`, which Python reads as one text: two texts in a row are no list.
    """
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown escapes
        value = ast.literal_eval(text.strip())
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
        texts_in_a_row = any(one == other == tokenize.STRING for one, other in pairwise(kinds))
        return value if isinstance(value, list | dict) and not texts_in_a_row else text
    return text


def text_of(value: object, what: str) -> str:
    """Return `value` if it is text.

    Raises:
        RowError: It is not text.
    """
    if not isinstance(value, str):
        raise RowError("wrong type", f"{what} is {json_kind(value)}; it must be text")
    return value


def nonempty_text(row: Mapping[str, object], column: str) -> str:
    """Return the text of a column that must not be empty. Raises RowError if it is."""
    value = row.get(column)
    text = "" if value is None else text_of(value, f"'{column}'")
    if not text.strip():
        raise RowError("no answer" if column in ANSWER_COLUMNS else "empty content", f"'{column}' is empty")
    return text


def passage_text(value: object, column: str = "passage") -> str:
    """Return a passage: a text, or an object with `text` and an optional `title`, as in BEIR and Tevatron.

    Raises RowError, which names `column`, if it is neither.
    """
    if isinstance(value, Mapping) and "text" in value:
        title = str(value.get("title") or "").strip()
        return f"{title}\n{nonempty_text(value, 'text')}" if title else nonempty_text(value, "text")
    return nonempty_text({column: value}, column)


def find_file(value: object) -> str | None:
    """Return the file that a cell names: text, or a mapping with a `path`."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value if isinstance(value, str) and value else None


RawRow = tuple[str, dict[str, object] | RowError]
"""A row's origin, and its columns or the reason why they cannot be read."""


def too_many_bad(looked: str, share: float, allowed: float, more: str = "") -> Problem:
    """Return the problem for a share of bad rows above `data.max_dropped`; `more` is appended to the fix.

    It proposes no large `max_dropped`: the rows are then read wrongly rather than bad.
    """
    allow = f", or set data.max_dropped: {math.ceil(100 * share) / 100}" if share <= MOST_DROPPED else ""
    what = f"{looked} are bad: {share:.1%}, and data.max_dropped allows {allowed:.1%}"
    return Problem(what, fix=f"Fix them{allow}.{more}")


@contextmanager
def listed(path: Path) -> Iterator[Callable[[dict[str, str]], object]]:
    """Yield a function that adds a line to a list. The list replaces `path` at the end; an empty one removes it."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield lambda entry: file.write(json.dumps(entry) + "\n")
    if not path.stat().st_size:
        path.unlink()
