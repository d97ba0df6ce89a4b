"""Make debian-summaries.jsonl: what Debian packages say of themselves at length, each with their one-line description.

python recipes/data/make_debian_summaries.py --lists /tmp/lists recipes/data/debian-summaries.jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from make_debian_sections import UNINFORMATIVE, arguments, content_words, digest, fetch_lists, is_known, stanzas

ROWS = 400
LEFT_OUT = ("libs", "libdevel", "debug", "oldlibs", "localization", "doc", "introspection")
MIN_WORDS, MAX_WORDS = 25, 70
MAX_SUMMARY_WORDS = 9


def main() -> None:
    """Fetch the package lists, choose rows, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    rows = list(choose(given.lists))
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows")


def choose(lists: Path) -> Iterator[dict[str, object]]:
    """Yield one row a source package, in the order of a hash, without near-duplicates."""
    long = {}
    for file in sorted(lists.glob("*_Translation-en*")):
        long |= {stanza["Package"]: stanza.get("Description-en", "") for stanza in stanzas(file)}
    packages = [stanza for file in sorted(lists.glob("*_binary-*_Packages*")) for stanza in stanzas(file)]
    packages.sort(key=lambda stanza: digest(stanza["Package"]))
    sources: set[str] = set()
    seen: list[frozenset[str]] = []
    for stanza in packages:
        name, short = stanza["Package"], stanza["Description"]
        source = stanza.get("Source", name).split(" ")[0]
        body = first_paragraph(long.get(name, ""))
        if stanza["Section"] in LEFT_OUT or source in sources or not is_usable(short, body):
            continue
        words = content_words(f"{body} {short}")
        if not is_known(words, seen):
            sources.add(source)
            seen.append(words)
            yield to_row(name, source, short, body)
        if len(seen) == ROWS:
            return


def first_paragraph(long: str) -> str:
    """Join the lines of the long description up to its first empty line, written as a single dot."""
    return re.split(r"(?:^| )\.(?: |$)", " ".join(long.split("\n")[1:]), maxsplit=1)[0].strip()


def is_usable(short: str, body: str) -> bool:
    """Whether both are plain sentences of the right length, and the short one does not stand in the long one."""
    words = len(body.split())
    return (
        MIN_WORDS <= words <= MAX_WORDS
        and 4 <= len(short.split()) <= MAX_SUMMARY_WORDS
        and f"{body}{short}".isascii()
        and body.endswith(".")
        and not re.search(r"[*|{}<>\\]| [-o] ", body)
        and not re.search(r"[()]| - |--", short)
        and short.lower() not in body.lower()
        and not UNINFORMATIVE.search(short)
    )


def to_row(package: str, source: str, short: str, body: str) -> dict[str, object]:
    """One chat row; `source` and `package` stand beside it."""
    messages = [
        {"role": "user", "content": f"Sum up in one line what this software is.\n\n{body}"},
        {"role": "assistant", "content": short[:1].upper() + short[1:]},
    ]
    return {"messages": messages, "source": source, "package": package}


if __name__ == "__main__":
    main()
