"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

UNITS = ("B", "kB", "MB", "GB", "TB")
DASH = "–"
MINUS = "−"


def missing(value: Any) -> bool:
    """Say whether there is no number."""
    return value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)


def score(value: Any) -> str:
    """Four significant digits, at most four decimals."""
    if missing(value):
        return DASH
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        text = f"{value:.3g}"
    else:
        text = f"{value:.{4 if size < 1 else 3 if size < 10 else 2 if size < 100 else 1}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def signed(value: Any) -> str:
    """Like `score`, with a sign."""
    text = score(value)
    return text if missing(value) or value <= 0 else f"+{text}"


def count(value: Any) -> str:
    """A whole number with its thousands apart."""
    return DASH if missing(value) else f"{value:,.0f}"


def size(value: Any) -> str:
    """Bytes in decimal units."""
    if missing(value):
        return DASH
    amount, unit = float(value), 0
    while abs(amount) >= 1000 and unit < len(UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.0f} {UNITS[unit]}" if unit == 0 or amount >= 100 else f"{amount:.3g} {UNITS[unit]}"


def duration(seconds: Any) -> str:
    """Seconds, minutes or hours."""
    if missing(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def share(part: Any, whole: Any, digits: int = 1) -> str:
    """A part of a whole as a percentage."""
    return DASH if missing(part) or missing(whole) or not whole else f"{100 * part / whole:.{digits}f} %"


def chance(p: Any) -> str:
    """A p-value."""
    return DASH if missing(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def short(value: float) -> str:
    """A label of an axis."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value / 1000:g}k" if size >= 1e4 else f"{value:g}"
