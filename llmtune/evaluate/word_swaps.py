"""Words for groups, swapped in a text for their partners: case kept, ambiguous words left and counted."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmtune.errors import DataError, Problem
from llmtune.evaluate.suite_files import OWN_FILES, read_sources, read_utf8
from llmtune.recipe.eval_suites_section import OWN

FIX = "Write two different words a line: woman,man"


@dataclass(frozen=True)
class Swapped:
    """A text after the swap."""

    text: str
    words: tuple[str, ...]
    """The words that were swapped, as they stood."""
    ambiguous: tuple[str, ...]
    """Words with several partners, left as they stood."""


@dataclass(frozen=True)
class Swaps:
    """Pairs of words; one with several partners is ambiguous in that direction."""

    partners: Mapping[str, Sequence[str]]
    """By word in lower case."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds the words, the longest first, where they stand alone."""
        words = sorted(self.partners, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)

    def swap(self, text: str) -> Swapped:
        """Put each word's partner in its place."""
        words: list[str] = []
        ambiguous: list[str] = []

        def partner(match: re.Match[str]) -> str:
            partners = self.partners[match[0].lower()]
            (words if len(partners) == 1 else ambiguous).append(match[0])
            return in_case_of(match[0], partners[0]) if len(partners) == 1 else match[0]

        return Swapped(self.pattern.sub(partner, text), tuple(words), tuple(ambiguous))

    def is_swapped(self, before: str, after: str) -> bool:
        """Whether `after` is `before` with every word swapped; an ambiguous one for any of its partners."""
        parts, end = [], 0
        for match in self.pattern.finditer(before):
            partners = [re.escape(in_case_of(match[0], one)) for one in self.partners[match[0].lower()]]
            parts.append(re.escape(before[end : match.start()]) + f"(?:{'|'.join(partners)})")
            end = match.end()
        return re.fullmatch("".join(parts) + re.escape(before[end:]), after) is not None


def in_case_of(model: str, word: str) -> str:
    """Write `word` in the case of `model`: HE, He or he."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def read_swaps(sources: Sequence[str]) -> Swaps:
    """Read pairs of words; each source is `own` or a CSV file of two columns.

    Raises DataError for files that cannot be read or used, with all bad lines.
    """
    partners: dict[str, list[str]] = {}
    for pair in read_sources(sources, read_pairs_of_words, "pair of words", FIX):
        for word, partner in (pair, pair[::-1]):
            known = partners.setdefault(word.lower(), [])
            if partner.lower() not in map(str.lower, known):
                known.append(partner)
    return Swaps(partners)


def read_pairs_of_words(source: str) -> list[tuple[str, str] | Problem]:
    """Read the pairs of one CSV file, and what is wrong with its other lines."""
    path = Path(str(OWN_FILES.joinpath("groups/swaps.csv"))) if source == OWN else Path(source)
    reader = csv.reader(io.StringIO(read_utf8(path, "Correct evaluate.fairness.swaps.")))
    items: list[tuple[str, str] | Problem] = []
    try:
        for cells in reader:
            words = [cell.strip() for cell in cells]
            if not any(words):
                continue
            if len(words) == 2 and all(words) and words[0].lower() != words[1].lower():
                items.append((words[0], words[1]))
            else:
                where = f"{path.name}:{reader.line_num}"
                items.append(Problem(f"not two different words: {', '.join(cells)!r:.60}", where, FIX))
    except csv.Error as error:
        raise DataError.of(f"not valid CSV: {error}", f"{path.name}:{reader.line_num}") from error
    return items
