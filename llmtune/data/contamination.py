"""Finds test rows that overlap training rows: equal, nearly equal, with the same prompt, or with 13 words in common.

13-word runs are the measure of Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C. As there, runs
in more than ten training rows are ignored: they are boilerplate, or the template of all rows. Words are those of the
search for near duplicates: letters and digits, Han and similar characters one by one. Comparison ignores case, width
and the kind of spaces (NFKC, case folding).

Legend: W words, V runs of words, R texts of a batch, G distinct runs of the test rows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtune.data.deduplication import match_near
from llmtune.data.input_overlap import COMMON_ROWS, JsonRows, find_shared_inputs
from llmtune.data.row_kind import compared_text
from llmtune.data.row_store import iterate_batches, iterate_ids, iterate_texts
from llmtune.data.row_text import visible_form
from llmtune.data.word_hash import I64, U64, hash_words
from llmtune.records import Rows

WORDS = 13
FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """Overlapping test rows by number, each with the first training row (by number) that it overlaps with."""

    test_rows: int
    train_rows: int
    """Number of distinct training rows: copies of a row by weight count once."""
    short: frozenset[int]
    """Test rows with fewer than 13 words."""
    equal: dict[int, int]
    near: dict[int, int]
    prompted: dict[int, int]
    """Rows whose input, with system message and tools, is that of a training row, or short and one word from it."""
    worded: dict[int, int]
    """Short rows whose words all appear in a training row, in order."""
    shared: dict[int, int]
    """Rows that share 13 consecutive words with a training row."""
    runs: dict[int, str]
    """The first shared run of each row in `shared`."""
    common: int
    """Number of distinct runs that were ignored because more than ten training rows have them."""
    inherited: frozenset[int] = frozenset()
    """Test rows whose input an earlier run learned, from which this one starts."""

    @property
    def rows(self) -> frozenset[int]:
        """All test rows that overlap in any way."""
        return frozenset((*self.equal, *self.near, *self.prompted, *self.worded, *self.shared, *self.inherited))


@dataclass(frozen=True)
class _Runs:
    """The runs of some texts; texts too short for one have all their words instead."""

    runs: U64
    """[V] hash of each run."""
    texts: I64
    """[V] index of each run's text, ascending; the runs of a text are complete and in order."""
    short: dict[int, bytes]
    """Text -> the hashes of its words."""


def find_overlap(rows: Rows, *, near: bool) -> Overlap:
    """Compare every test row with all training rows; `near` also searches for nearly equal ones.

    The comparison covers all text except system messages. If rows are questions about a text, it covers questions and
    answers: several rows about one text are usual. Memory: about fifty bytes for each word of the test rows, and for
    each training row.
    """
    texts = [same_form(compared_text(json.loads(text))) for _, text in iterate_texts(rows, "test")]
    test_numbers = {name: number for number, name in enumerate(iterate_ids(rows, "test"))}
    tests = find_runs(texts)
    search = _RunSearch(tests.runs)
    short_tests: defaultdict[bytes, list[int]] = defaultdict(list)
    for number, words in tests.short.items():
        short_tests[words].append(number)
    equal: dict[int, int] = {}
    worded: dict[int, int] = {}
    first_N = _first_copies(rows)
    for first, batch in iterate_batches(rows, "train"):
        new = {}
        written = zip(batch.column("id").to_pylist(), batch.column("row").to_pylist(), strict=True)
        for number, (name, text) in enumerate(written, start=first):
            if first_N[number]:
                new[number] = same_form(compared_text(json.loads(text)))
            if name in test_numbers:
                equal.setdefault(test_numbers[name], number)
        trained = find_runs(list(new.values()))
        number_R = np.fromiter(new, np.int64, len(new))
        search.add(trained.runs, number_R[trained.texts])
        for short, words in trained.short.items():
            for test in short_tests.get(words, ()) if words else ():
                worded.setdefault(test, int(number_R[short]))
    shared, runs = _first_shared(tests, search, texts)
    train_numbers, first_test = np.flatnonzero(first_N), len(first_N)
    tests_N = first_test + np.arange(len(texts))
    near_tests = _find_near(rows, train_numbers, tests_N) if near else {}
    inputs = find_shared_inputs(tests_N, train_numbers, _numbered(rows))
    return Overlap(
        test_rows=len(texts),
        train_rows=len(train_numbers),
        short=frozenset(tests.short),
        equal=equal,
        near={test - first_test: train for test, train in near_tests.items()},
        prompted={test - first_test: train for test, train in sorted(inputs.first.items())},
        worded=worded,
        shared=shared,
        runs=runs,
        common=int((search.count_G > COMMON_ROWS).sum()),
    )


def _first_copies(rows: Rows) -> npt.NDArray[np.bool_]:
    """Return a mask of the training rows that are no copy of an earlier one."""
    batches = (batch.column("id").to_pylist() for _, batch in iterate_batches(rows, "train"))
    id_N = np.frombuffer(b"".join(bytes.fromhex("".join(ids)) for ids in batches), dtype="S16")
    first_N = np.zeros(len(id_N), dtype=bool)
    first_N[np.unique(id_N, return_index=True)[1]] = True
    return first_N


def same_form(text: str) -> str:
    """Return a text normalised for comparison: case, width, the kind and number of spaces, no invisible characters."""
    return " ".join(visible_form(text).casefold().split())


def find_runs(texts: Sequence[str]) -> _Runs:
    """Hash every 13-word run, as a polynomial of its words' hashes modulo 2**64."""
    word_W, text_W, _ = hash_words(list(texts))
    count = max(len(word_W) - WORDS + 1, 0)
    run_V = np.zeros(count, dtype=np.uint64)
    for offset in range(WORDS):
        run_V = run_V * FACTOR + word_W[offset : count + offset]
    inside_V = text_W[:count] == text_W[WORDS - 1 :]  # the first and the last word belong to the same text
    begin_R = np.searchsorted(text_W, np.arange(len(texts)))
    end_R = np.searchsorted(text_W, np.arange(len(texts)), side="right")
    short = np.flatnonzero(end_R - begin_R < WORDS).tolist()
    return _Runs(
        run_V[inside_V],
        text_W[:count][inside_V],
        {text: word_W[begin_R[text] : end_R[text]].tobytes() for text in short},
    )


class _RunSearch:
    """Counts the training rows that contain each run of the test rows."""

    def __init__(self, runs: U64) -> None:
        self.run_G = np.unique(runs)
        self.count_G = np.zeros(len(self.run_G), dtype=np.int64)
        self.first_G = np.full(len(self.run_G), -1, dtype=np.int64)
        """[G] the first of those training rows."""

    def add(self, run_V: U64, row_V: I64) -> None:
        """Count the runs of training rows, each given with its row's number."""
        slot_V = np.searchsorted(self.run_G, run_V)
        known_V = slot_V < len(self.run_G)
        known_V[known_V] = self.run_G[slot_V[known_V]] == run_V[known_V]
        if not known_V.any():
            return
        slots, rows = np.unique(np.stack([slot_V[known_V], row_V[known_V]]), axis=1)
        np.add.at(self.count_G, slots, 1)
        new, at = np.unique(slots, return_index=True)
        unseen = self.first_G[new] < 0
        self.first_G[new[unseen]] = rows[at[unseen]]


def _first_shared(tests: _Runs, search: _RunSearch, texts: Sequence[str]) -> tuple[dict[int, int], dict[int, str]]:
    """Return, by test row, the first training row with a run of it that is not common, and the run's words."""
    slot_V = np.searchsorted(search.run_G, tests.runs)
    rare_V = np.flatnonzero((search.count_G[slot_V] > 0) & (search.count_G[slot_V] <= COMMON_ROWS))
    rows, at = np.unique(tests.texts[rare_V], return_index=True)
    shared, runs = {}, {}
    for row, run in zip(rows.tolist(), rare_V[at].tolist(), strict=True):
        shared[row] = int(search.first_G[slot_V[run]])
        runs[row] = _words_from(texts[row], run - int(np.searchsorted(tests.texts, row)))
    return shared, runs


def _words_from(text: str, first: int) -> str:
    """Return thirteen words of a text in lower case, starting at word number `first`."""
    coded = text.lower().encode()
    byte_W = [*hash_words([text])[2].tolist(), len(coded)]
    piece = coded[byte_W[first] : byte_W[first + WORDS]].decode(errors="replace")
    return " ".join(piece.split())


def _numbered(rows: Rows) -> JsonRows:
    """Return an iterator over the training rows, then the test rows, numbered together."""

    def texts() -> Iterator[tuple[int, pa.Array]]:
        for split, offset in (("train", 0), ("test", rows.counts["train"])):
            for first, batch in iterate_batches(rows, split):
                yield offset + first, batch.column("row")

    return texts


def _find_near(rows: Rows, kept: I64, tests: I64) -> dict[int, int]:
    """Return, by test row, a nearly equal training row among those at `kept`."""
    with TemporaryDirectory(dir=rows.folder.parent, prefix=".keys-") as keys:
        matches = match_near(kept, tests, _numbered(rows), Path(keys))
        return {row: int(near[0]) for row, near in matches}
