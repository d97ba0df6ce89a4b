"""Make debian-preferences.jsonl: of two one-line descriptions, the package's own is preferred to its neighbour's.

python recipes/data/make_debian_preferences.py --lists /tmp/lists recipes/data/debian-preferences.jsonl
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice

from debian_packages import Package, keep_distinct, read_share, write_rows
from make_debian_sections import arguments, content_words, fetch_lists
from make_debian_short import can_be_summed_up, one_line

ROWS = 800
ROWS_A_SECTION = 100
ASKED = "Sum up in one line what this software is."
TOO_CLOSE = 0.3
A_LINE_SERVES = 2


def main() -> None:
    """Fetch the package lists, choose rows, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    usable = (package for package in read_share(given.lists, "preferences") if can_be_summed_up(package))
    rows = [to_row(*pair) for pair in islice(pair_up(list(keep_distinct(usable, ROWS_A_SECTION))), ROWS)]
    write_rows(given.out, rows)


def pair_up(packages: list[Package]) -> Iterator[tuple[Package, Package]]:
    """Yield each package with the other one whose texts share most with its own, a rare word counting for more.

    A line that could stand for the package as well is no choice: one that shares `TOO_CLOSE` of its words with the
    package's own, or whose words all stand in the description. No line is rejected more than `A_LINE_SERVES` times.
    """
    words = {package: content_words(f"{package.short} {package.paragraphs[0]}") for package in packages}
    weights = weigh_words(words.values())
    served = dict.fromkeys(packages, 0)
    for package in packages:
        line, own = content_words(package.short), words[package]
        others = [
            other
            for other in packages
            if other is not package
            and served[other] < A_LINE_SERVES
            and is_another(line, own, content_words(other.short))
        ]
        nearest = max(others, key=lambda other: overlap(own, words[other], weights))
        served[nearest] += 1
        yield package, nearest


def weigh_words(texts: Collection[frozenset[str]]) -> dict[str, float]:
    """The weight of each word: the logarithm of the share of texts that have it, without its sign."""
    counts = Counter(word for words in texts for word in words)
    return {word: math.log(len(texts) / count) for word, count in counts.items()}


def overlap(one: frozenset[str], other: frozenset[str], weights: dict[str, float]) -> float:
    """The weighted share of words that two texts have in common, from 0 to 1."""
    return sum(map(weights.__getitem__, one & other)) / sum(map(weights.__getitem__, one | other))


def is_another(line: frozenset[str], described: frozenset[str], other: frozenset[str]) -> bool:
    """Whether the words `other` say something else than a line, and than the description that it sums up."""
    return len(line & other) < TOO_CLOSE * len(line | other) and not other <= described


def to_row(package: Package, neighbour: Package) -> dict[str, object]:
    """One choice between two lines, and where it comes from."""
    prompt = f"{ASKED}\n\n{package.paragraphs[0]}"
    return {"prompt": prompt, "chosen": one_line(package), "rejected": one_line(neighbour), "source": package.source}


if __name__ == "__main__":
    main()
