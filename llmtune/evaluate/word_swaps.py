"""Words for groups, swapped in a text for their partners: case kept, ambiguous words left and told."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmtune.data.file_readers import explained, open_bytes
from llmtune.errors import DataError, Problem
from llmtune.evaluate.paired_sentences import SETS
from llmtune.recipe.eval_suites_section import OWN


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

    partners: Mapping[str, tuple[str, ...]]
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

        def put(found: re.Match[str]) -> str:
            partners = self.partners_of(found[0])
            (words if len(partners) == 1 else ambiguous).append(found[0])
            return like(partners[0], found[0]) if len(partners) == 1 else found[0]

        return Swapped(self.pattern.sub(put, text), tuple(words), tuple(ambiguous))

    def partners_of(self, word: str) -> tuple[str, ...]:
        """Return what a word may become."""
        return self.partners[word.lower()]

    def follows(self, before: str, after: str) -> bool:
        """Whether `after` is `before` with every word swapped; an ambiguous one for any of its partners."""
        parts, end = [], 0
        for found in self.pattern.finditer(before):
            options = "|".join(re.escape(like(partner, found[0])) for partner in self.partners_of(found[0]))
            parts.append(re.escape(before[end : found.start()]) + f"(?:{options})")
            end = found.end()
        return re.fullmatch("".join(parts) + re.escape(before[end:]), after) is not None


def like(word: str, model: str) -> str:
    """Write `word` in the case of `model`: HE, He or he."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def read_swaps(places: Sequence[str]) -> Swaps:
    """Read pairs of words; each place is `own` or a CSV file of two columns.

    Raises DataError for files that cannot be read or used, with all bad lines.
    """
    partners: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for place in places:
        before = len(partners)
        for origin, cells in read_lines(SETS / "swaps.csv" if place == OWN else Path(place)):
            words = [cell.strip() for cell in cells]
            if len(words) != 2 or not all(words) or words[0].lower() == words[1].lower():
                problems.append(Problem(f"not two different words: {', '.join(cells)!r:.60}", origin))
                continue
            for word, partner in (words, words[::-1]):
                known = partners.setdefault(word.lower(), [])
                if partner.lower() not in map(str.lower, known):
                    known.append(partner)
        if len(partners) == before and not problems:
            problems.append(Problem("there are no pairs of words in it", place, "Write two words a line: woman,man"))
    DataError.collect(problems)
    return Swaps({word: tuple(known) for word, known in partners.items()})


def read_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of a CSV file's lines, empty lines left out, with their origins."""
    if not path.is_file():
        raise DataError.of("there is no such file", str(path), "Correct evaluate.fairness.swaps.")
    with explained(path.name), open_bytes(path) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError.of(
                f"the file is not UTF-8 at byte {error.start}", path.name, "Save it as UTF-8."
            ) from error
    reader = csv.reader(io.StringIO(text))
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"{path.name}:{reader.line_num}", cells
    except csv.Error as error:
        raise DataError.of(f"not valid CSV: {error}", f"{path.name}:{reader.line_num}") from error
