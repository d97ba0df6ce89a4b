"""Formats numbers for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

UNITS = ("B", "kB", "MB", "GB", "TB")
DASH = "–"
MINUS = "−"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def missing(value: object) -> bool:
    """Return whether a value is not a finite number."""
    return not is_number(value)


def score(value: object) -> str:
    """Format with about four significant digits and at most four decimals."""
    if not is_number(value):
        return DASH
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        text = f"{value:.3g}"
    else:
        text = f"{value:.{4 if size < 1 else 3 if size < 10 else 2 if size < 100 else 1}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def signed(value: object) -> str:
    """Format like `score`, with a sign."""
    return f"+{score(value)}" if is_number(value) and value > 0 else score(value)


def count(value: object) -> str:
    """Format an integer with thousands separators."""
    return f"{value:,.0f}" if is_number(value) else DASH


def size(value: object) -> str:
    """Format bytes in decimal units."""
    if not is_number(value):
        return DASH
    amount, unit = float(value), 0
    while abs(amount) >= 1000 and unit < len(UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.0f} {UNITS[unit]}" if unit == 0 or amount >= 100 else f"{amount:.3g} {UNITS[unit]}"


def duration(seconds: object) -> str:
    """Format seconds as seconds, minutes or hours."""
    if not is_number(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def share(part: object, whole: object, digits: int = 1) -> str:
    """Format a part of a total as a percentage."""
    return f"{100 * part / whole:.{digits}f} %" if is_number(part) and is_number(whole) and whole else DASH


def chance(p: object) -> str:
    """Format a p-value: three decimals, of smaller ones two significant digits, which `evaluate.looks` needs."""
    if not is_number(p):
        return DASH
    return "< 0.00001" if p < 1e-5 else f"{p:.3f}" if p >= 0.001 else f"{p:.{1 - math.floor(math.log10(p))}f}"


def short(value: float) -> str:
    """Format an axis label."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value / 1000:g}k" if size >= 1e4 else f"{value:g}"


def join_names(metrics: Sequence[str]) -> str:
    """Join metric names with commas and `and`, without underscores."""
    words = [metric.replace("_", " ") for metric in metrics]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
