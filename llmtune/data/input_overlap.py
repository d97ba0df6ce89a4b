"""Finds rows whose input is that of a held-out row: the same words or picture, or short queries one word apart.

Short queries have too few word triples for the search for near duplicates. Two of up to 30 words match if one has a
word more, or if one word differs and the answers are equal or the words begin alike. Words with digits and names
(capital letters) never differ within a match, since such queries ask for different things; nor do the words of a
template, which many different rows share. The first word may be a name: it differs only if the answers are equal.
Labelled rows match this way only if they have the same label. Rows with an equal picture match whatever their texts.

Legend: K keys, W words, R rows of a batch, G distinct keys of the held-out rows, H hits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from llmtune.data.arrow_columns import number_column
from llmtune.data.pictures import Picture, look_same, row_pictures
from llmtune.data.row_kind import row_input
from llmtune.data.row_text import RowInput, plain_words
from llmtune.data.word_hash import I64, U64, mix
from llmtune.data.worker_pool import WorkerPool

JsonRows = Callable[[], Iterator[tuple[int, pa.Array]]]
"""Yields all rows as JSON, in batches, each with the number of its first row."""
COMMON_ROWS = 10
COMMON_SHARE = 0.1
"""An input in more than ten training rows and more than this share of them is the task itself."""
TEMPLATE_ROWS = 3
"""Queries with one variable word in more different rows than this are a template."""
MOST_WORDS = 30
"""The search for near duplicates finds longer texts that differ by one word."""
FEWEST_WORDS = 3
"""Fewest words that two queries with a word more or less share; with another word, one more."""
STEM_LETTERS = 4
"""Words that differ only after so many letters are forms or spellings of one word."""
FIXED = re.compile(r"[\d+#$=<>%]|^\W+$")
"""Words that never differ between two queries that match: numbers and signs."""
LOOK_BITS = 10
"""Of the 64 bits of a perceptual hash: copies in another size or compression differ in fewer."""
NONE = np.iinfo(np.int64).max
SAME, WHOLE, SHORTER, FRAME, CHANGED, SPELLED, PICTURE = range(11, 18)
"""Kinds of keys, as salts."""


class InputKeys(NamedTuple):
    """The keys of a batch of rows; rows match if they share one."""

    key: U64
    """[K] the keys."""
    row: I64
    """[K] the row's number."""
    input: U64
    """[K] hash of the row's input."""
    frame: U64
    """[K] the key whose rows are counted to recognise a template; 0 if the key only counts."""


@dataclass(frozen=True)
class InputOverlap:
    """Rows that match, in both directions."""

    others: dict[int, int]
    """Row with the input of held-out rows -> the first of those in their given order."""
    first: dict[int, int]
    """Held-out row -> the first other row with its input."""


def find_shared_inputs(held: I64, others: I64, rows: JsonRows) -> InputOverlap:
    """Compare the inputs of rows `held`, those with priority first, with those of `others`; both are given by number.

    Memory: about 30 bytes for each key of a held-out row, of which a query has four for each of its up to 30 words.
    """
    rank_N = np.zeros(int(held.max(initial=0)) + 1, dtype=np.int32)
    rank_N[held] = np.arange(len(held))
    parts: list[tuple[U64, npt.NDArray[np.int32], U64]] = []
    halves: set[int] = set()
    for keys, batch_halves in _map_keys(_InputSigner(), held, rows):
        parts.append((keys.key, rank_N[keys.row], keys.input))
        halves |= batch_halves
    if not len(others) or not any(len(key) for key, _, _ in parts):
        return InputOverlap({}, {})
    input_N = np.zeros(len(held), dtype=np.uint64)
    for _, rank, same in parts:
        input_N[rank] = same
    rank_K = np.concatenate([rank for _, rank, _ in parts])
    key_G, slot_K = np.unique(np.concatenate([key for key, _, _ in parts]), return_inverse=True)
    del parts
    inputs = np.unique(input_N)
    hits: list[InputKeys] = []
    for keys, _ in _map_keys(_InputSigner(frozenset(halves)), others, rows):
        hit_K = is_in(key_G, keys.key) & ((keys.key == keys.input) | ~is_in(inputs, keys.input))
        hits.append(InputKeys(*(column[hit_K] for column in keys)))
    hit = _join(hits)
    slot_H = np.searchsorted(key_G, hit.key)
    was_hit_G = np.zeros(len(key_G), dtype=bool)
    was_hit_G[slot_H] = True
    rank_K, slot_K = rank_K[was_hit_G[slot_K]], slot_K[was_hit_G[slot_K]]
    taken_H = _take_inputs(hit, key_G, slot_H, slot_K, input_N[rank_K], len(others))
    best_G = np.full(len(key_G), len(held), dtype=np.int64)
    np.minimum.at(best_G, slot_K, rank_K)
    first_G = np.full(len(key_G), NONE, dtype=np.int64)
    np.minimum.at(first_G, slot_H[taken_H], hit.row[taken_H])
    first_K = first_G[slot_K]
    matched = first_K < NONE
    best_ranks = _smallest(hit.row[taken_H], best_G[slot_H[taken_H]])
    return InputOverlap(
        {row: int(held[rank]) for row, rank in sorted(best_ranks.items())},
        _smallest(held[rank_K[matched]], first_K[matched]),
    )


def find_near_pictures(held: I64, others: I64, rows: JsonRows) -> dict[int, int]:
    """Return each of `others` with a picture nearly equal to one of a row in `held`, and that row; all by number.

    A picture that matches those of many rows is the task itself, such as an empty page.
    """
    shown_H, shown_O = ([*_list_pictures(numbers, rows).values()] for numbers in (held, others))
    matches = dict[int, int]()
    alike_H = match_looks([one for one, _ in shown_H], [one for one, _ in shown_O])
    for (_, first), alike in zip(shown_H, alike_H, strict=True):
        near = [row for place in alike for row in shown_O[place][1]]
        if len(near) <= max(COMMON_ROWS, COMMON_SHARE * len(others)):
            for row in near:
                matches.setdefault(row, first[0])
    return matches


def match_looks(pictures: Sequence[Picture], others: Sequence[Picture]) -> Iterator[list[int]]:
    """Yield for each picture the places of those in `others` that are nearly equal.

    Their perceptual hashes differ in at most LOOK_BITS bits, and their thumbnails nowhere by much.
    """
    look_O = np.array([int(one["look"], 16) for one in others], np.uint64)
    thumbnails: dict[str, npt.NDArray[np.float32]] = {}
    for picture in pictures:
        near = np.flatnonzero(np.bitwise_count(look_O ^ np.uint64(int(picture["look"], 16))) <= LOOK_BITS)
        yield [place for place in near.tolist() if look_same(picture, others[place], thumbnails)]


def _list_pictures(numbers: I64, rows: JsonRows) -> dict[str, tuple[Picture, list[int]]]:
    """Return the different pictures of the rows with these numbers, each with its rows."""
    pictures: dict[str, tuple[Picture, list[int]]] = {}
    for first, batch in rows():
        shown = pc.indices_nonzero(pc.match_substring(batch, '"look":')).to_pylist()
        for number in np.intersect1d(first + np.asarray(shown, dtype=np.int64), numbers).tolist() if shown else ():
            for picture in row_pictures(json.loads(batch[number - first].as_py())):
                pictures.setdefault(picture["content"], (picture, []))[1].append(number)
    return pictures


def _take_inputs(
    hit: InputKeys, key_G: U64, slot_H: I64, slot_K: I64, input_K: U64, others: int
) -> npt.NDArray[np.bool_]:
    """Return [H] which hits count: those whose input is not the task itself, or whose query is not a template."""
    rows_G = np.bincount(slot_H, minlength=len(key_G))
    inputs_G = _count_distinct(np.append(slot_H, slot_K), np.append(hit.input, input_K), len(key_G))
    frame_H = np.searchsorted(key_G, np.where(hit.frame == 0, hit.key, hit.frame))
    is_template_H = (inputs_G[frame_H] > TEMPLATE_ROWS) | (hit.frame == 0)
    most = max(COMMON_ROWS, COMMON_SHARE * others)
    taken_H: npt.NDArray[np.bool_] = np.where(hit.key == hit.input, rows_G[slot_H] <= most, ~is_template_H)
    return taken_H


def is_in(values_G: U64, values: U64) -> npt.NDArray[np.bool_]:
    """Return which values are in a sorted array that is not empty; `np.isin` would sort both at every call."""
    slots = np.minimum(np.searchsorted(values_G, values), len(values_G) - 1)
    matches: npt.NDArray[np.bool_] = values_G[slots] == values
    return matches


def _smallest(rows: I64, values: I64) -> dict[int, int]:
    """Return the smallest of the values of each row."""
    smallest: dict[int, int] = {}
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        smallest[row] = min(value, smallest.get(row, value))
    return smallest


def _join(parts: Sequence[InputKeys]) -> InputKeys:
    return InputKeys(*map(np.concatenate, zip(*parts, strict=True)))


def _count_distinct(slots: I64, values: U64, count: int) -> I64:
    """Return [G] the number of distinct values of each slot."""
    pairs = np.unique(mix(values, 1) ^ mix(slots.astype(np.uint64), 2), return_index=True)[1]
    counts: I64 = np.bincount(slots[pairs], minlength=count)
    return counts


def _map_keys(signer: _InputSigner, numbers: I64, rows: JsonRows) -> Iterator[tuple[InputKeys, set[int]]]:
    return WorkerPool(signer).map(select_rows(numbers, rows), lambda batch: len(batch[1]), len(numbers))


def select_rows(numbers: I64, rows: JsonRows) -> Iterator[tuple[I64, list[str]]]:
    """Yield the rows with these numbers as JSON, in batches, with their numbers."""
    if not len(numbers):
        return
    taken = np.zeros(int(numbers.max()) + 1, dtype=bool)
    taken[numbers] = True
    for first, batch in rows():
        places = np.flatnonzero(taken[first : first + len(batch)])
        if len(places):
            yield first + places, batch.take(number_column(places)).to_pylist()


@dataclass(frozen=True)
class _InputSigner:
    """Computes the keys of a batch; runs in every process.

    A word more, or another word, leaves the words before it and after it, and one of these is half of the query. Only
    rows that share a half with a held-out query of about their length have keys, and only for words outside that half.
    """

    halves: frozenset[int] | None = None
    """Of `_halves`, for all held-out queries; None while these rows are signed. A longer query of theirs matches
    a shorter one of the others, and vice versa."""

    def __call__(self, batch: tuple[I64, list[str]]) -> tuple[InputKeys, set[int]]:
        """Return the keys of the rows, and the halves of held-out queries."""
        columns: list[tuple[int, int, int, int]] = []
        halves: set[int] = set()
        for number, row in zip(batch[0].tolist(), batch[1], strict=True):
            input_parts = row_input(json.loads(row))
            pictures = {hash((PICTURE, _hash(content))) for content in input_parts.pictures}
            columns += [(key, number, key, key) for key in pictures]  # before the row's input, which counts
            words = plain_words(input_parts.query)
            text = " ".join(words).casefold()
            plain = text.split()
            count, places = len(plain), range(len(plain))
            if self.halves is None:
                halves.update(*(_halves(plain, count + more) for more in (-1, 0, 1)))
            else:
                first, last = (half in self.halves for half in _halves(plain, count))
                if not (first or last):
                    continue
                places = places[0 if last else count // 2 : count if first else count // 2]
            context, text = input_parts.context(), text or input_parts.query.strip()
            if not (text or context):
                continue
            same = hash((SAME, _hash(context), _hash(text)))
            columns.append((same, number, same, same))
            if FEWEST_WORDS <= count <= MOST_WORDS:
                changed = self._changed_keys(input_parts, context, words, plain, places)
                columns += [(key, number, same, frame) for key, frame in changed]
        key, numbers, same_input, frame = np.array(columns, np.int64).reshape(-1, 4).T
        return InputKeys(key.view(np.uint64), numbers, same_input.view(np.uint64), frame.view(np.uint64)), halves

    def _changed_keys(
        self, input_parts: RowInput, before: str, words: list[str], plain: list[str], places: range
    ) -> Iterator[tuple[int, int]]:
        """Yield the keys of a query without the word at each of the places, each with its frame."""
        answer = _hash(input_parts.answer())
        context = hash((_hash(before), answer if input_parts.labelled else 0))
        answered = hash((context, answer))
        whole, shorter = (WHOLE, SHORTER) if self.halves is None else (SHORTER, WHOLE)
        hashes = tuple(map(_hash, plain))
        for one in (context, answered):
            yield (key := hash((whole, one, hash(hashes)))), key
        for place in places:
            word = words[place]
            is_name = word[0].isupper()
            if FIXED.search(word) or (place and is_name):
                continue
            rest = hash(hashes[:place] + hashes[place + 1 :])
            yield (frame := hash((FRAME, context, rest, place))), 0
            if len(plain) > FEWEST_WORDS:
                yield (key := hash((shorter, answered if is_name else context, rest))), key
                yield hash((CHANGED, answered, rest, place)), frame
            if len(word) > STEM_LETTERS:
                yield hash((SPELLED, context, rest, place, _hash(plain[place][:STEM_LETTERS]))), frame


def _halves(words: list[str], count: int) -> tuple[int, int]:
    """Hash the first and the last words of a query as halves of one of `count` words."""
    half = max(count, 0) // 2
    first, last = words[:half], words[max(len(words) - half, 0) :]
    return _hash(f"{count} {' '.join(first)}"), _hash(f"{-count} {' '.join(last)}")


def _hash(text: str) -> int:
    """Hash a text; Python's hash of such numbers is the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))
