"""Fonts of this machine that have the letters of a text, for pictures that are drawn and not shown by a browser."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib import font_manager

UNFIT = ("Emoji", "Last Resort")
"""In names of fonts that have coloured bitmaps, which cannot be drawn, or boxes for every letter there is."""
FIRST = "DejaVu Sans"
"""Comes with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic."""
SHAPED = {"\u200c", "\u200d", "\ufe0f"}
"""Characters that change their neighbours and have no picture of their own."""


def families_for(texts: Iterable[str]) -> tuple[list[str], str]:
    """Return names of font families in the order to look into, and the characters that none of them has."""
    missing = {letter for text in texts for letter in text if not letter.isspace()} - SHAPED
    families: list[str] = []
    first = font_manager.FontEntry(fname=font_manager.findfont(FIRST), name=FIRST)
    for entry in (first, *sorted(font_manager.fontManager.ttflist, key=_rank)):
        if not missing:
            break
        if entry.name in families or any(word in entry.name for word in UNFIT):
            continue
        found = missing & _letters(entry.fname)
        if found or entry is first:
            families.append(entry.name)
            missing -= found
    return families or [FIRST], "".join(sorted(missing))


def _letters(path: str) -> set[str]:
    return {chr(code) for code in font_manager.get_font(path).get_charmap()}


def _rank(entry: font_manager.FontEntry) -> tuple[bool, bool, str]:
    upright = str(entry.weight) in {"400", "normal", "regular"} and entry.style == "normal"
    return not upright, "Sans" not in entry.name or "Mono" in entry.name, entry.name
