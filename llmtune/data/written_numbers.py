"""Numbers that a table has as text: with a decimal point or a decimal comma, and with separators of thousands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmtune.store.resource_limits import LARGEST_NUMBER

PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
CODE = re.compile(r"[+-]?0\d+", re.ASCII)
"""A postcode or an account, which is no number."""
POINT = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", re.ASCII)
COMMA = re.compile(r"[+-]?(\d+|[1-9]\d{0,2}(\.\d{3})+),\d+|[+-]?[1-9]\d{0,2}(\.\d{3})+", re.ASCII)
THOUSANDS = re.compile(r"(?<=\d)['’ \u00a0\u202f](?=\d{3}(?!\d))")
"""Separators of thousands that are never a decimal sign."""
THREE_DIGITS = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}", re.ASCII)
"""One number with a decimal sign, another with a separator of thousands."""
PlainNumber = int | float


def read_number(value: object) -> PlainNumber | None:
    """Return the number in a cell, without its column; None if there is none, or if a comma may separate thousands."""
    text = _text(value)
    if text is None or ("," in text and THREE_DIGITS.fullmatch(text)):
        return None
    return _point(text) if _point(text) is not None else _comma(text)


def read_numbers(values: Sequence[object]) -> list[PlainNumber | None] | None:
    """Return the number of each cell of a column, None for empty ones; None if some cell is no number.

    A column has one decimal sign if it can. Where each comma is followed by three digits, commas separate thousands,
    as in `1,234`. A column with both signs, such as files of different programs, is read cell by cell, and is no number
    where a cell has two readings.
    """
    texts = [_text(value) for value in values]
    cells = [text for text in texts if text]
    if any(text is None or CODE.fullmatch(text) for text in texts) or not cells:
        return None
    for read in (_plain, _point, _comma) if _are_thousands(cells) else (_plain, _comma, _point):
        if all(read(text) is not None for text in cells):
            return [read(text) if text else None for text in texts]
    if any(THREE_DIGITS.fullmatch(text) for text in cells):
        return None
    numbers = [read_number(text) if text else None for text in texts]
    return None if any(text and number is None for text, number in zip(texts, numbers, strict=True)) else numbers


def _are_thousands(cells: Sequence[str]) -> bool:
    return all(THREE_DIGITS.fullmatch(text) or POINT.fullmatch(text) for text in cells if "," in text)


def _text(value: object) -> str | None:
    """Return a cell without separators that are no decimal sign; empty if it is missing, None if it is no number."""
    if value is None or value != value:  # a number that is not equal to itself is NaN
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return THOUSANDS.sub("", str(value).strip().replace("\u2212", "-"))


def _plain(text: str) -> PlainNumber | None:
    if not PLAIN.fullmatch(text) or abs(float(text)) > LARGEST_NUMBER:
        return None
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def _point(text: str) -> PlainNumber | None:
    return _plain(text.replace(",", "")) if POINT.fullmatch(text) else _plain(text)


def _comma(text: str) -> PlainNumber | None:
    whole = text.lstrip("+-").isdecimal()
    return _plain(text.replace(".", "").replace(",", ".")) if whole or COMMA.fullmatch(text) else None
