"""Debian packages and what they say of themselves, as the makers of the sets made from it read them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from make_debian_sections import content_words, digest, is_known, stanzas
from make_debian_summaries import LEFT_OUT, first_paragraph

SHARES = {"short": 0, "preferences": 1, "facts": 2, "mentions": 3}
FIRST_NAMES = (
    "Adam|Alan|Alex|Andreas|Andrew|Bill|Bob|Brian|Chris|Christian|Daniel|Dave|David|Eric|Frank|George|Greg|Hans|Ian|James"
    "|Jean|Jeff|Jim|Joe|John|Karl|Kevin|Larry|Mark|Markus|Martin|Matt|Matthias|Michael|Mike|Nick|Oliver|Paul|Peter"
    "|Philip|Pierre|Richard|Robert|Simon|Stefan|Stephen|Steve|Thomas|Tim|Tom|William"
)
PERSONAL = re.compile(
    r"@|\bauthors?\b|\bmaintainers?\b|\bcopyright|\bcredits?\b|\bMr\b|\bDr\b"
    r"|\b(?:by|from|of|to|and|author) (?:[A-Z][a-z]+|[A-Z]\.)(?: [A-Z]\.)? (?:Mc|Mac|O'|van |von |de )?[A-Z][a-z]+"
    r"|\b[A-Z][a-z]+ [A-Z]\. [A-Z][a-z]+|\b[A-Z][a-z]+ [A-Z][a-z]+'s?\b|[Ww]ritten by|[Dd]eveloped by|[Cc]reated by"
    rf"|\b(?:{FIRST_NAMES}) [A-Z]"
)
VERBATIM = re.compile(r"[*|{}<>\\`=_]|\s[-o+] |--")


@dataclass(frozen=True)
class Package:
    """One binary package: `paragraphs` are those of the long description, `fields` the whole stanza."""

    name: str
    source: str
    section: str
    short: str
    paragraphs: tuple[str, ...]
    fields: dict[str, str] = field(compare=False)


def read_all(lists: Path) -> list[Package]:
    """Read every package once, in the order of a hash of its name, without libraries and other parts of software."""
    long = {}
    for file in sorted(lists.glob("*_Translation-en*")):
        long |= {stanza["Package"]: stanza.get("Description-en", "") for stanza in stanzas(file)}
    packages = {}
    for file in sorted(lists.glob("*_binary-*_Packages*")):
        for stanza in stanzas(file):
            name = stanza["Package"]
            if stanza.get("Section") not in (*LEFT_OUT, None) and name not in packages:
                packages[name] = to_package(stanza, long.get(name, ""))
    return sorted(packages.values(), key=lambda package: digest(package.name))


def to_package(stanza: dict[str, str], long: str) -> Package:
    """Put a package together from its stanza in the package list and its long description."""
    name = stanza["Package"]
    source = stanza.get("Source", name).split(" ")[0]
    return Package(name, source, stanza["Section"], stanza["Description"], tuple(paragraphs(long)), stanza)


def paragraphs(long: str) -> Iterator[str]:
    """Yield the paragraphs of a long description, their lines joined; an empty line is written as a single dot."""
    for part in "\n".join(long.split("\n")[1:]).split("\n.\n"):
        if text := first_paragraph(f"\n{part}"):
            yield re.sub(r"\s+", " ", text)


def read_share(lists: Path, name: str) -> list[Package]:
    """Read the packages whose sources fall to the set `name`: no two sets of `SHARES` have a source in common."""
    return [package for package in read_all(lists) if int(digest(package.source)[:8], 16) % len(SHARES) == SHARES[name]]


def keep_distinct(packages: Iterable[Package], a_section: int) -> Iterator[Package]:
    """Leave out second packages of a source, near-duplicates, and what is above `a_section` packages of a section."""
    sources: set[str] = set()
    sections: Counter[str] = Counter()
    seen: list[frozenset[str]] = []
    for package in packages:
        words = content_words(" ".join((package.short, *package.paragraphs[:1])))
        if package.source in sources or sections[package.section] == a_section or is_known(words, seen):
            continue
        sources.add(package.source)
        sections[package.section] += 1
        seen.append(words)
        yield package


def names_somebody(text: str) -> bool:
    """Whether a text looks as if it had a mail address or the name of a person in it; errs on the side of yes."""
    return bool(PERSONAL.search(text))


def is_prose(text: str) -> bool:
    """Whether a text is plain sentences: no list, code or table, and a full stop at its end."""
    return text.endswith((".", "!")) and text[:1].isupper() and not VERBATIM.search(text)


def sentences(text: str) -> list[str]:
    """Split a paragraph into sentences; an abbreviation does not end one."""
    not_after = "".join(
        rf"(?<!\b{re.escape(short)})" for short in ("e.g.", "i.e.", "etc.", "vs.", "z.B.", "bzw.", "d.h.")
    )
    ends = rf"(?<=[.!?]){not_after}(?<!\b[A-Z]\.)\s+(?=[A-ZÄÖÜ])"
    return re.split(ends, text)


def write_rows(out: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON lines and say how many they are."""
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows, {out.stat().st_size:,} bytes")
