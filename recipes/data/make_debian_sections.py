"""Make debian-sections.jsonl: short texts about Debian packages, each with the archive section that the package is in.

Needs a Debian machine with apt and no rights beyond a folder to write to:

    python recipes/data/make_debian_sections.py --lists /tmp/lists recipes/data/debian-sections.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("database", "editors", "electronics", "fonts", "games", "hamradio", "mail", "math", "sound", "video")
ROWS_A_SECTION = 120
ROWS_A_SOURCE = 2
MAX_WORDS = 34
ALIKE = 0.5
SYSTEM = "Name the Debian section of the package."
ROLES = (
    r"(?:\w+ data|test|data|manual|common|binary|binaries|support|example|documentation|runtime|architecture|arch"
    r"|library|development|client|server|plugin|gui|metapackage)"
)
UNINFORMATIVE = re.compile(
    r"transitional|dummy|metapackage|debug symbols|documentation|development files|test ?data"
    r"|^(?:common|support|shared|data) files|^files for",
    re.IGNORECASE,
)
STOP = frozenset(
    re.findall(
        r"\w+", "a an and are as at be by can for from in is it its of on or that the this to with which you your"
    )
)


@dataclass(frozen=True)
class Package:
    """One binary package: its source package, section, and what it says of itself."""

    name: str
    source: str
    section: str
    text: str


def main() -> None:
    """Fetch the package lists, choose rows, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    rows = list(choose(read_packages(given.lists)))
    rows.sort(key=lambda package: digest(package.name))
    given.out.write_text("".join(json.dumps(to_row(package)) + "\n" for package in rows), encoding="utf-8")
    print(f"{len(rows)} rows from {len({package.source for package in rows})} sources")
    print(dict(Counter(package.section for package in rows)))


def arguments(
    about: str | None, option: str = "lists", said: str = "folder for apt's package lists"
) -> argparse.Namespace:
    """Read the command line: `out`, and where the material is, in an option of its own (`lists`)."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{option}", type=Path, required=True, help=said)
    parser.add_argument("out", type=Path)
    return parser.parse_args()


def fetch_lists(folder: Path) -> None:
    """Let apt download the package lists with their English and German descriptions into `folder`."""
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "-o", f"Dir::State::lists={folder}", "-o", "Acquire::Languages=en,de", "update"]
    subprocess.run(command, check=True, capture_output=True)


def read_packages(folder: Path) -> Iterator[Package]:
    """Yield the packages of `SECTIONS` that say enough about themselves."""
    long = {}
    for file in sorted(folder.glob("*_Translation-en*")):
        long |= {stanza["Package"]: stanza.get("Description-en", "") for stanza in stanzas(file)}
    for file in sorted(folder.glob("*_binary-*_Packages*")):
        for stanza in stanzas(file):
            name, section = stanza["Package"], stanza.get("Section", "")
            if section not in SECTIONS or UNINFORMATIVE.search(stanza["Description"]):
                continue
            source = stanza.get("Source", name).split(" ")[0]
            if text := describe(stanza["Description"], long.get(name, "")):
                yield Package(name, source, section, text)


def stanzas(file: Path) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a Debian control file, compressed as apt keeps it."""
    text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", file], check=True, capture_output=True).stdout
    for block in text.decode("utf-8").split("\n\n"):
        stanza: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line[:1].isspace():
                stanza[key] += "\n" + line.strip()
            elif ":" in line:
                key, _, value = line.partition(":")
                stanza[key] = value.strip()
        if stanza:
            yield stanza


def describe(short: str, long: str) -> str:
    """Join the one-line description (without words like "data files") and the first sentence of the long one."""
    short = re.sub(rf"\s*(?:\(.*\)|[-:]+ {ROLES}\b.*)$", "", short, flags=re.I).strip(" -.,:")
    body = " ".join(line for line in long.split("\n")[1:] if line).split(" . ")[0]
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", body, maxsplit=1)[0].strip()
    if any(mark in sentence for mark in "*•|{}<>\\") or not re.search(r"(?!\betc|\bresp|\bal)[a-z]{2}[.!]$", sentence):
        sentence = ""
    text = f"{short[:1].upper()}{short[1:]}."
    if sentence and len(sentence.split()) >= 5 and len(f"{text} {sentence}".split()) <= MAX_WORDS:
        text = f"{text} {sentence}"
    words = len(text.split())
    return text if 6 <= words <= MAX_WORDS and text.isascii() else ""


def choose(packages: Iterable[Package]) -> Iterator[Package]:
    """Yield `ROWS_A_SECTION` packages of each section, in the order of a hash, without near-duplicates."""
    by_section: dict[str, list[Package]] = defaultdict(list)
    for package in packages:
        by_section[package.section].append(package)
    seen: list[frozenset[str]] = []
    for section in SECTIONS:
        a_source: Counter[str] = Counter()
        taken = 0
        for package in sorted(by_section[section], key=lambda package: digest(package.name)):
            words = content_words(package.text)
            if taken == ROWS_A_SECTION or a_source[package.source] == ROWS_A_SOURCE or is_known(words, seen):
                continue
            seen.append(words)
            a_source[package.source] += 1
            taken += 1
            yield package


def content_words(text: str) -> frozenset[str]:
    """The words of a text, without those that every text has."""
    return frozenset(re.findall(r"[a-z0-9+]+", text.lower())) - STOP


def is_known(words: frozenset[str], seen: list[frozenset[str]]) -> bool:
    """Whether at least half of the words (Jaccard) are those of a text that was taken before."""
    return any(len(words & other) >= ALIKE * len(words | other) for other in seen)


def digest(text: str) -> str:
    """A hash to order by: stable, and unrelated to the alphabet."""
    return hashlib.sha256(text.encode()).hexdigest()


def to_row(package: Package) -> dict[str, object]:
    """One chat row; `source` and `package` stand beside it."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": package.text},
        {"role": "assistant", "content": package.section},
    ]
    return {"messages": messages, "source": package.source, "package": package.name}


if __name__ == "__main__":
    main()
