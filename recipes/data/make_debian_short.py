"""Make debian-short.jsonl: what Debian packages say of themselves at length, to be summed up in a line.

python recipes/data/make_debian_short.py --lists /tmp/lists recipes/data/debian-short.jsonl
"""

from __future__ import annotations

from itertools import islice

from debian_packages import Package, is_prose, keep_distinct, names_somebody, read_share, write_rows
from make_debian_sections import arguments, content_words, fetch_lists
from make_debian_summaries import is_usable

ROWS = 1000
ROWS_A_SECTION = 100
DERIVED = 1 / 3


def main() -> None:
    """Fetch the package lists, choose rows, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    usable = (package for package in read_share(given.lists, "short") if can_be_summed_up(package))
    write_rows(given.out, [to_row(package) for package in islice(keep_distinct(usable, ROWS_A_SECTION), ROWS)])


def can_be_summed_up(package: Package) -> bool:
    """Whether the first paragraph is prose of the right length, without persons, and says what the short line says."""
    body = package.paragraphs[0] if package.paragraphs else ""
    if ";" in package.short or not is_usable(package.short, body) or not is_prose(body):
        return False
    line = stems(package.short)
    return len(line & stems(body)) >= DERIVED * len(line) and not names_somebody(f"{body}\n{package.short}")


def stems(text: str) -> frozenset[str]:
    """The words of a text that say something, singular and plural as one."""
    return frozenset(word.removesuffix("s") for word in content_words(text))


def one_line(package: Package) -> str:
    """The short description, as a line of its own."""
    short = package.short.rstrip(" .")
    return short[:1].upper() + short[1:]


def to_row(package: Package) -> dict[str, object]:
    """One row to sum up, and where it comes from."""
    return {"document": package.paragraphs[0], "summary": one_line(package), "source": package.source}


if __name__ == "__main__":
    main()
