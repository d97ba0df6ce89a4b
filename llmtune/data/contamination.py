"""Test rows that stand in the training rows: equal, nearly equal, or with thirteen words in a row in common.

Runs of 13 words are the measure of Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C; runs that
stand in more than ten training rows are left out there and here: they are boilerplate, or the template of all rows.
Words are those of the search for near duplicates: letters and digits in lower case, Han and the like one by one.

Legend: W words, V runs of words, R texts of a batch, G distinct runs of the test rows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.data.minhash import I64, U64, hash_words, match_near
from llmtune.data.preparation import iterate_ids, iterate_texts
from llmtune.data.row_hash import spoken_text
from llmtune.data.splits import mix
from llmtune.records import Row, Rows

WORDS = 13
COMMON_ROWS = 10
"""A run in more training rows than this tells nothing of a single test row."""
BATCH = 1024
FACTOR = 0x9E3779B97F4A7C15
INVERSE = pow(FACTOR, -1, 2**64)
MOST_BITS = 27
"""Of a table that says of most runs at once that no test row has them: 128 MiB at most."""


@dataclass(frozen=True)
class Overlap:
    """Test rows by number, each with the first training row (by number) that it overlaps with."""

    test_rows: int
    train_rows: int
    """Different ones: copies of a row by weight are one."""
    short: frozenset[int]
    """Test rows of fewer than 13 words."""
    equal: dict[int, int]
    near: dict[int, int]
    worded: dict[int, int]
    """Short rows whose words are all those of a training row, in order."""
    shared: dict[int, int]
    """Rows that have 13 words in a row in common with a training row."""
    runs: dict[int, str]
    """Of each of `shared`, the first such run."""
    common: int
    """Distinct runs that were left out, since more than ten training rows have them."""

    @property
    def rows(self) -> frozenset[int]:
        """All test rows that overlap in one way or another."""
        return frozenset((*self.equal, *self.near, *self.worded, *self.shared))


@dataclass(frozen=True)
class _Runs:
    """The runs of some texts; of those that are too short for one, a hash of all their words."""

    runs: U64
    """[V]"""
    texts: I64
    """[V] which text each run is from, ascending."""
    begins: I64
    """[V] the byte of that text, in lower case, that the run begins at."""
    ends: I64
    """[V] the byte that its last word begins at."""
    short: dict[int, int]
    """Text -> hash; 0 for one without words."""


def find_overlap(rows: Rows, *, near: bool) -> Overlap:
    """Compare every test row with all training rows; `near` also looks for nearly equal ones.

    What is compared is all that is said but for the system message; of questions about a text, questions and answers:
    that several are about one text is usual. Takes some fifty bytes for each word of the test rows.
    """
    texts = [compared_text(json.loads(text)) for _, text in iterate_texts(rows, "test")]
    names = {name: number for number, name in enumerate(iterate_ids(rows, "test"))}
    search = _Search(find_runs(texts))
    equal: dict[int, int] = {}
    numbers: dict[str, int] = {}
    for first, batch in _batches(rows):
        new = {}
        for number, (name, written) in enumerate(batch, start=first):
            if name not in numbers:
                numbers[name] = number
                new[number] = compared_text(json.loads(written))
            if name in names:
                equal.setdefault(names[name], number)
        search.add(np.fromiter(new, np.int64, len(new)), find_runs(list(new.values())))
    shared, runs = search.shared(texts)
    kept = np.fromiter(numbers.values(), np.int64, len(numbers))
    return Overlap(
        test_rows=len(texts),
        train_rows=len(numbers),
        short=frozenset(search.tests.short),
        equal=equal,
        near=_find_near(rows, kept, len(texts)) if near else {},
        worded=search.worded,
        shared=shared,
        runs=runs,
        common=int((search.count_G > COMMON_ROWS).sum()),
    )


def compared_text(row: Row) -> str:
    """Return what is said in a row, in the order of its parts."""
    if "context" in row:
        return " ".join([row["question"], *(answer["text"] for answer in row["answers"])])
    return str(row["text"]) if "audio" in row else spoken_text(row)


def _batches(rows: Rows) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Yield the training rows as (id, JSON), each batch with the number of its first."""
    first, batch = 0, []
    for name, (_, text) in zip(iterate_ids(rows, "train"), iterate_texts(rows, "train"), strict=True):
        batch.append((name, text))
        if len(batch) == BATCH:
            yield first, batch
            first, batch = first + len(batch), []
    if batch:
        yield first, batch


def find_runs(texts: Sequence[str]) -> _Runs:
    """Hash every run of 13 words, as a polynomial of its words' hashes modulo 2**64."""
    word_W, text_W, byte_W = hash_words(list(texts))
    power_W = np.multiply.accumulate(np.full(len(word_W) + 1, FACTOR, dtype=np.uint64))
    inverse_W = np.multiply.accumulate(np.full(len(word_W) + 1, INVERSE, dtype=np.uint64))
    sum_W = np.concatenate([np.zeros(1, np.uint64), np.cumsum(word_W * power_W[:-1], dtype=np.uint64)])

    def hash_between(begin_V: I64, end_V: I64) -> U64:
        return mix((sum_W[end_V] - sum_W[begin_V]) * inverse_W[begin_V], 8)

    last = len(word_W) - WORDS + 1
    start_V = np.flatnonzero(text_W[:last] == text_W[WORDS - 1 :]) if last > 0 else np.zeros(0, np.int64)
    begin_R = np.searchsorted(text_W, np.arange(len(texts)))
    end_R = np.searchsorted(text_W, np.arange(len(texts)), side="right")
    size_R = end_R - begin_R
    short = np.flatnonzero(size_R < WORDS)
    whole = np.where(size_R[short] > 0, hash_between(begin_R[short], end_R[short]), np.uint64(0))
    return _Runs(
        hash_between(start_V, start_V + WORDS),
        text_W[start_V],
        byte_W[start_V],
        byte_W[start_V + WORDS - 1],
        dict(zip(short.tolist(), whole.tolist(), strict=True)),
    )


class _Search:
    """Looks for the runs of the test rows among those of training rows, which come in batches."""

    def __init__(self, tests: _Runs) -> None:
        self.tests = tests
        self.run_G = np.unique(tests.runs)
        self.count_G = np.zeros(len(self.run_G), dtype=np.int64)
        """[G] how many training rows have each run."""
        self.first_G = np.full(len(self.run_G), -1, dtype=np.int64)
        """[G] the first of them."""
        self.worded: dict[int, int] = {}
        self._short: dict[int, list[int]] = defaultdict(list)
        for number, words in tests.short.items():
            if words:
                self._short[words].append(number)
        self._shift = np.uint64(64 - min(MOST_BITS, max(10, (len(self.run_G) * 8).bit_length())))
        self._known = np.zeros(2 ** (64 - int(self._shift)), dtype=bool)
        self._known[self.run_G >> self._shift] = True

    def add(self, numbers: I64, rows: _Runs) -> None:
        """Look at training rows; `numbers` are theirs, in the order of the texts."""
        for text, words in rows.short.items():
            for test in self._short.get(words, ()):
                self.worded.setdefault(test, int(numbers[text]))
        maybe_V = np.flatnonzero(self._known[rows.runs >> self._shift])
        if not len(maybe_V):
            return
        run_V = rows.runs[maybe_V]
        place_V = np.minimum(np.searchsorted(self.run_G, run_V), len(self.run_G) - 1)
        found_V = self.run_G[place_V] == run_V
        pairs = np.unique(np.stack([place_V[found_V], rows.texts[maybe_V][found_V]]), axis=1)
        places, texts = pairs
        np.add.at(self.count_G, places, 1)
        new, at = np.unique(places, return_index=True)
        unseen = self.first_G[new] < 0
        self.first_G[new[unseen]] = numbers[texts[at[unseen]]]

    def shared(self, texts: Sequence[str]) -> tuple[dict[int, int], dict[int, str]]:
        """Return by test row the first training row with a run of it, and the run; `texts` are those of the tests."""
        tests = self.tests
        if not len(tests.runs):
            return {}, {}
        place_V = np.searchsorted(self.run_G, tests.runs)
        told_V = np.flatnonzero((self.count_G[place_V] > 0) & (self.count_G[place_V] <= COMMON_ROWS))
        rows, at = np.unique(tests.texts[told_V], return_index=True)
        shared, runs = {}, {}
        for row, place in zip(rows.tolist(), told_V[at].tolist(), strict=True):
            shared[row] = int(self.first_G[place_V[place]])
            runs[row] = _between(texts[row], int(tests.begins[place]), int(tests.ends[place]))
        return shared, runs


def _between(text: str, begin: int, end: int) -> str:
    """Return the words of a text from the byte `begin` to the word at the byte `end`, in lower case."""
    coded = text.lower().encode()
    _, _, bytes_W = hash_words([text])
    behind = bytes_W[bytes_W > end]
    piece = coded[begin : int(behind[0]) if len(behind) else len(coded)].decode(errors="replace")
    return " ".join(piece.split())


def _find_near(rows: Rows, kept: I64, tests: int) -> dict[int, int]:
    """Return by test row a training row, of those at `kept`, that is nearly equal to it."""
    count = rows.counts["train"]

    def texts() -> Iterator[tuple[int, list[str]]]:
        for side, offset in (("train", 0), ("test", count)):
            first, batch = offset, []
            for _, text in iterate_texts(rows, side):
                batch.append(spoken_text(json.loads(text)))
                if len(batch) == BATCH:
                    yield first, batch
                    first, batch = first + len(batch), []
            if batch:
                yield first, batch

    found = match_near(kept, np.arange(count, count + tests), texts)
    return {row - count: int(near[0]) for row, near in found.items()}
