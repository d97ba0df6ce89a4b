"""Make debian-search.jsonl: a one-line description as a query, its package's description, and four others.

python recipes/data/make_debian_search.py --lists /tmp/lists recipes/data/debian-search.jsonl
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice

from debian_packages import Package, is_prose, keep_distinct, names_somebody, read_all, write_rows
from make_debian_preferences import is_another, overlap, weigh_words
from make_debian_sections import UNINFORMATIVE, arguments, content_words, fetch_lists

ROWS = 500
ROWS_A_SECTION = 40
NEGATIVES = 4
MIN_WORDS, MAX_WORDS = 20, 45
QUERY_WORDS = 3, 9
PASSAGE_SERVES = 6


def main() -> None:
    """Fetch the package lists, choose rows, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    usable = (package for package in read_all(given.lists) if is_searchable(package))
    packages = list(islice(keep_distinct(usable, ROWS_A_SECTION), ROWS))
    write_rows(given.out, list(make_rows(packages)))


def is_searchable(package: Package) -> bool:
    """Whether a package has a passage of the right length, and a line that does not occur in it."""
    line, passage = package.short, package.paragraphs[0] if package.paragraphs else ""
    return (
        MIN_WORDS <= len(passage.split()) <= MAX_WORDS
        and QUERY_WORDS[0] <= len(line.split()) <= QUERY_WORDS[1]
        and f"{line}{passage}".isascii()
        and is_prose(passage)
        and not names_somebody(f"{line} {passage}")
        and not UNINFORMATIVE.search(line)
        and line.lower() not in passage.lower()
    )


def make_rows(packages: list[Package]) -> list[dict[str, object]]:
    """Return a row per package; its negatives are the passages of its section that share most with the query.

    A passage that may answer the query too is no negative (`is_another`), and none serves more than six times.
    """
    words = {package: content_words(package.paragraphs[0]) for package in packages}
    weights = weigh_words([*words.values(), *(content_words(package.short) for package in packages)])
    sections: dict[str, list[Package]] = defaultdict(list)
    for package in packages:
        sections[package.section].append(package)
    served, rows = dict.fromkeys(packages, 0), []
    for package in packages:
        query = content_words(package.short)
        others = [
            other
            for other in sections[package.section]
            if other is not package
            and served[other] < PASSAGE_SERVES
            and is_another(query, words[package], content_words(other.short))
        ]
        nearest = sorted(others, key=lambda other: -overlap(query, words[other], weights))[:NEGATIVES]
        if len(nearest) < NEGATIVES:
            continue
        for other in nearest:
            served[other] += 1
        negatives = [other.paragraphs[0] for other in nearest]
        rows.append({"query": package.short, "passage": package.paragraphs[0], "negatives": negatives})
    return rows


if __name__ == "__main__":
    main()
