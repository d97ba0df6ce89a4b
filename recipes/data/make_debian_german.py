"""Make debian-german.jsonl: lines and sentences of Debian's package descriptions in English and in German.

python recipes/data/make_debian_german.py --lists /tmp/lists recipes/data/debian-german.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from debian_packages import Package, names_somebody, paragraphs, read_all, sentences, write_rows
from make_debian_sections import arguments, content_words, digest, fetch_lists, is_known, stanzas

ROWS = 1500
MIN_WORDS, MAX_WORDS = 4, 25
SAME_AT_MOST = 0.4
LENGTHS = (0.65, 1.7)
MARKS = re.compile(r"[*|{}<>\\=_;`]|--|\s-\s|- |-$|\.\.|\(s\)|\bhttps?:|[„“”\"]")
FOREIGN = re.compile(r"\b(?:the|and|with|for|from|this|of|to|is)\b", re.IGNORECASE)


def main() -> None:
    """Fetch the package lists, choose rows, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    write_rows(given.out, list(choose(pair_up(read_all(given.lists), read_german(given.lists)))))


def read_german(lists: Path) -> dict[tuple[str, str], str]:
    """Read the German descriptions, each by its package and the sum of the English text that it translates."""
    return {
        (stanza["Package"], stanza["Description-md5"]): stanza["Description-de"]
        for file in sorted(lists.glob("*_Translation-de*"))
        for stanza in stanzas(file)
    }


def pair_up(packages: Iterable[Package], german: dict[tuple[str, str], str]) -> Iterator[tuple[Package, str, str]]:
    """Yield English and German of a package: the first sentence where both texts have it, else the short line."""
    for package in packages:
        text = german.get((package.name, package.fields.get("Description-md5", "")))
        if text is None:
            continue
        lines = (package.short, text.split("\n", 1)[0])
        pairs = [pair for pair in (first_sentences(package, text), lines) if is_translated(*pair)]
        if pairs:
            yield package, *min(pairs, key=lambda pair: digest(pair[0]))


def first_sentences(package: Package, german: str) -> tuple[str, str]:
    """The first sentence of both long descriptions; empty where their first paragraphs differ in sentences."""
    source = sentences(next(iter(package.paragraphs), ""))
    target = sentences(next(paragraphs(german), ""))
    alike = len(source) == len(target) and source[0].endswith((".", "!")) and target[0].endswith((".", "!"))
    return (source[0], target[0]) if alike else ("", "")


def is_translated(source: str, target: str) -> bool:
    """Whether the second text looks like a whole translation of the first, both plain and of the right length."""
    words, others = source.split(), target.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or not 3 <= len(others) <= MAX_WORDS + 5:
        return False
    if any(
        MARKS.search(text) or names_somebody(text) or text.count("(") != text.count(")") for text in (source, target)
    ):
        return False
    same = len({word.lower() for word in words} & {word.lower() for word in others})
    ratio = len(target) / len(source)
    if not LENGTHS[0] <= ratio <= LENGTHS[1] or same > SAME_AT_MOST * len(others) or FOREIGN.search(target):
        return False
    return sorted(re.findall(r"\d+", source)) == sorted(re.findall(r"\d+", target))


def choose(pairs: Iterable[tuple[Package, str, str]]) -> Iterator[dict[str, object]]:
    """Yield `ROWS` rows, one a source package, without near-duplicates in either language."""
    sources: set[str] = set()
    seen: list[frozenset[str]] = []
    seen_german: list[frozenset[str]] = []
    for package, source, target in pairs:
        words, german = content_words(source), frozenset(re.findall(r"\w+", target.lower()))
        if package.source in sources or is_known(words, seen) or is_known(german, seen_german):
            continue
        sources.add(package.source)
        seen.append(words)
        seen_german.append(german)
        yield to_row(package, source, target)
        if len(seen) == ROWS:
            return


def to_row(package: Package, source: str, target: str) -> dict[str, object]:
    """One row to translate, and where it comes from."""
    named = {"source_language": "English", "target_language": "German"}
    return {"source": source, "target": target, **named, "package": package.name}


if __name__ == "__main__":
    main()
