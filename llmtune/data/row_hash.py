"""A row's content: as JSON, and as a hash for equality."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from typing import NamedTuple

import xxhash

from llmtune.data.rejected_rows import RowError
from llmtune.data.row_text import text_key
from llmtune.data.written_numbers import read_number

BATCH_ROWS = 1024
BATCH_BYTES = 2**22
"""A batch ends at whichever limit comes first: rows can be long."""
DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""A number with a decimal point."""
DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?", re.ASCII)
"""A date, perhaps with its time."""
_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_write_sorted = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode


class HashedRow(NamedTuple):
    """A good row after reading; see `row_store.Index` for the numbers and `Rows` for the texts."""

    origin: str
    row: str
    columns: str | None
    content: bytes
    text: int
    group: int
    source: int
    split: int
    filled: int = 0
    """The number of null keys that Arrow added, and that were dropped."""
    changes: tuple[tuple[str, str, str], ...] = ()
    """Class names that changed, as `class_spelling.NameChange`."""


def write_columns(cells: Mapping[str, object]) -> str:
    """Write the columns that no format reads as JSON: bytes in base64, and dates and Decimals as text."""
    return json.dumps(cells, default=lambda one: base64.b64encode(one).decode() if isinstance(one, bytes) else str(one))


def row_json(row: Mapping[str, object]) -> str:
    """Write a canonical row as JSON for the Arrow file.

    Raises:
        RowError: A text contains half of a surrogate pair, which cannot be encoded.
    """
    text = _dump(row)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise RowError("not a character", f"{half} is half of a surrogate pair") from None
    return text


def hash_content(row: Mapping[str, object]) -> bytes:
    """Hash a row's content to 16 bytes; Unicode composition and outer white space make no difference."""
    text = _write_sorted(_stripped(row))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return xxhash.xxh3_128_digest(text.encode())


def plain_label(label: object) -> object:
    """Return a label as JSON has it: 0.5 for `0.50` and `0,5`, 3 as a class for `3.0`, and true for `True`."""
    if isinstance(label, str) and DECIMAL.fullmatch(label):
        label = float(label)
    elif isinstance(label, str) and "," in label and (number := read_number(label)) is not None:
        label = float(number)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return label.lower() if isinstance(label, str) and label.lower() in ("true", "false") else label


def plain_value(value: object) -> str:
    """Write a cell so that equal values of any type and file are equal; empty for null, NaN and blanks.

    12, 12.0 and `12.0` are one value, and so are true and `True`, a date and its ISO text, and texts with the same
    `text_key`. `012` and `12` are two.
    """
    if isinstance(value, list | dict):
        return json.dumps(_plain_values(value), ensure_ascii=False, sort_keys=True)
    if isinstance(value, date | datetime):
        value = value.isoformat()
    text = text_key(str("" if value is None else value))
    if isinstance(value, float | Decimal) or DECIMAL.fullmatch(text):
        number = Decimal(text)
        return "" if number.is_nan() else f"{number.normalize() + 0:f}" if number.is_finite() else text
    if DATE.fullmatch(text):
        with suppress(ValueError):
            return datetime.fromisoformat(text).isoformat().removesuffix("T00:00:00")
    return text.lower() if text.lower() in ("true", "false") else text


def _plain_values(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain_values(item) for key, item in value.items()}
    return [_plain_values(item) for item in value] if isinstance(value, list) else plain_value(value)


def _stripped(value: object) -> object:
    """Strip every text in a row except file names."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    if isinstance(value, dict):
        if "picture" in value and "content" in value:
            return value["content"]
        named = "audio" in value and "content" in value
        return {key: _stripped(item) for key, item in value.items() if not (named and key == "audio")}
    return value


def iterate_strings(value: object) -> Iterator[str]:
    """Yield every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from iterate_strings(part)
