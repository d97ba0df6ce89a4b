"""Equal and nearly equal rows, in one split and across splits; what stays does not depend on the order of files.

Two texts are near if their sets of word triples overlap by 0.8 (Jaccard), the measure and threshold of Lee et al.,
"Deduplicating Training Data Makes Language Models Better" (2022). The overlap is estimated from 120 minima: Broder, "On
the resemblance and containment of documents" (1997); candidates come from 20 bands of 6 minima: Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4. Pairs at 0.8 become candidates with 99.8 %, at 0.9 nearly always; the
estimate's standard deviation at 0.8 is 0.037.

Rows of one template (a long instruction, a short question) overlap by more than that and are not alike, so triples that
a tenth of the rows share do not count, unless a row has no more than a word besides them.

Legend: B bytes, W words (and word triples, as many), R rows of a batch, N rows, P minima, L bands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from llmtune.data.row_store import Index
from llmtune.data.splits import mix
from llmtune.records import SPLITS

Texts = Callable[[], Iterator[tuple[int, list[str]]]]
"""Gives all texts in batches, each with the number of its first."""

NEAR = 0.8
BANDS = 20
BAND_SIZE = 6
MINIMA = BANDS * BAND_SIZE
SAMPLE_ROWS = 4096
COMMON_SHARE = 0.1
COMMON_ROWS = 20
"""A word triple in a tenth of all rows (and in 20 at least) is part of a template, and does not count."""
TRIPLES_OF_A_WORD = 3
BUCKET_ROWS = 256
"""Kept rows to which a row is compared for one band: a bucket as full as this holds texts of one template."""
BLOCK_WORDS = 2**15
"""Word triples that are hashed at a time: they stay in the processor's cache."""

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

POWERS = np.multiply.accumulate(np.full(2**12, 0x9E3779B97F4A7C15, dtype=np.uint64))
"""Of an odd number, modulo 2**64: a factor for each place in a word."""
LETTERS = np.isin(np.arange(256), [*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(0x80, 0x100)])


PRIORITY = np.array([2, 1, 0], dtype=np.int8)
"""By split: what stands in test is kept first, then validation, then train."""
KEPT = ""


def drop_equal(index: Index, split_N: npt.NDArray[np.int8], method: str) -> npt.NDArray[np.object_]:
    """Find rows that equal another: across splits always, in one split unless `method` is none.

    Returns:
        [N] the reason why a row is dropped, or KEPT. Of rows that are equal but for composition and outer white space,
        the one whose bytes have the smallest hash stays.
    """
    reason_N = np.full(len(index), KEPT, dtype=object)
    high_N, low_N = index.content.T
    priority_N = PRIORITY[split_N]
    order = np.lexsort((index.text, priority_N, low_N, high_N))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (high_N[order[1:]] != high_N[order[:-1]]) | (low_N[order[1:]] != low_N[order[:-1]])
    first_of = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    across = split_N[order] != split_N[first_of]
    for split, name in enumerate(SPLITS):
        reason_N[order[across & (split_N[first_of] == split)]] = f"equal to a {name} row"
    if method != "none":
        reason_N[order[~across & ~new]] = "exact duplicate"
    return reason_N


def drop_near(index: Index, split_N: npt.NDArray[np.int8], reason_N: npt.NDArray[np.object_], texts: Texts) -> None:
    """Find rows that are nearly another that is kept, and write the reason into `reason_N` in place.

    Test rows come first, then validation, then train, and in a split the smallest hash: a row is dropped if one before
    it that was kept is near. So no two kept rows are near each other, and each dropped row is near a kept one.

    Args:
        index: The rows.
        split_N: [N] index into SPLITS.
        reason_N: [N] why a row was dropped already; KEPT where it was not.
        texts: Gives the texts of all rows in order, in batches, each with the number of its first row.
    """
    kept = np.flatnonzero(reason_N == KEPT)
    priority = PRIORITY[split_N[kept]]
    high, low = index.content[kept].T
    order = kept[np.lexsort((low, high, priority))]
    for row, near in find_near(order, texts).items():
        splits = split_N[near]
        same = splits[np.argmin(PRIORITY[splits])]
        reason_N[row] = "near duplicate" if same == split_N[row] else f"near a {SPLITS[same]} row"


class _KeptRows:
    """Rows that are kept, by bucket, and the search for those that are near another row."""

    def __init__(self, signature_NP: U32, bucket_NL: npt.NDArray[np.int32]) -> None:
        self._signature_NP = signature_NP
        self._bucket_NL = bucket_NL
        self._rows: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, rank: int) -> None:
        """Keep a row; a bucket as full as BUCKET_ROWS takes no more."""
        for bucket in self._buckets(rank):
            if len(self._rows[bucket]) < BUCKET_ROWS:
                self._rows[bucket].append(rank)

    def near(self, rank: int) -> I64:
        """Return the kept rows that are near a row."""
        candidates = {other for bucket in self._buckets(rank) for other in self._rows.get(bucket, ())}
        rows = np.array(sorted(candidates), dtype=np.int64)
        if not len(rows):
            return rows
        near: I64 = rows[(self._signature_NP[rows] == self._signature_NP[rank]).mean(axis=1) >= NEAR]
        return near

    def _buckets(self, rank: int) -> list[int]:
        return [bucket for bucket in self._bucket_NL[rank].tolist() if bucket >= 0]


def find_near(order: I64, texts: Texts) -> dict[int, I64]:
    """Find the rows that are near a row that comes before them in `order` and is kept.

    Args:
        order: [N] numbers of the rows that take part, those first that are to be kept first.
        texts: Gives the texts of all rows.

    Returns:
        Dropped row -> the kept rows that it is near to.
    """
    signature_NP, bucket_NL = _sign(order, texts)
    kept = _KeptRows(signature_NP, bucket_NL)
    dropped: dict[int, I64] = {}
    for rank in np.flatnonzero((bucket_NL >= 0).any(axis=1)).tolist():
        near = kept.near(rank)
        if len(near):
            dropped[int(order[rank])] = order[near]
        else:
            kept.add(rank)
    return dropped


def match_near(known: I64, queries: I64, texts: Texts) -> dict[int, I64]:
    """Find the rows of `queries` that are near rows of `known`, and name those; other pairs are not looked at.

    Args:
        known: Numbers of rows, of which each band of minima holds the first 256.
        queries: Numbers of other rows.
        texts: Gives the texts of all rows.
    """
    order = np.concatenate([known, queries])
    signature_NP, bucket_NL = _sign(order, texts)
    bucket_NL[~np.isin(bucket_NL, bucket_NL[len(known) :])] = -1  # no query is in it
    kept = _KeptRows(signature_NP, bucket_NL)
    for rank in np.flatnonzero((bucket_NL[: len(known)] >= 0).any(axis=1)).tolist():
        kept.add(rank)
    matches = ((int(order[rank]), order[kept.near(rank)]) for rank in range(len(known), len(order)))
    return {row: near for row, near in matches if len(near)}


def _sign(order: I64, texts: Texts) -> tuple[U32, npt.NDArray[np.int32]]:
    """Return the minima and the buckets of each row, by its place in `order`."""
    signature_NP, has_words_N = _signatures(order, texts, _common_triples(order, texts))
    return signature_NP, _buckets(signature_NP, has_words_N)


def _common_triples(order: I64, texts: Texts) -> U32:
    """Return, sorted, the word triples that stand in many rows, seen in a sample that depends on the rows alone."""
    sample = np.zeros(int(order.max(initial=-1)) + 1, dtype=bool)
    sample[order[_spread(len(order))]] = True
    seen: list[U32] = []
    for first, batch in texts():
        sampled = np.flatnonzero(sample[first : first + len(batch)])
        if len(sampled):
            triple_W, row_W = hash_triples([batch[row] for row in sampled])
            pairs = np.unique((row_W.astype(np.uint64) << np.uint64(32)) | triple_W)
            seen.append(pairs.astype(np.uint32))
    triples, counts = np.unique(np.concatenate(seen or [np.zeros(0, np.uint32)]), return_counts=True)
    rows = min(len(order), SAMPLE_ROWS)
    return triples[(counts >= COMMON_ROWS) & (counts >= COMMON_SHARE * rows)]


def _spread(count: int) -> I64:
    """Places of the sample in an order that is by split and hash: evenly over it."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, SAMPLE_ROWS)).astype(np.int64))


def hash_triples(texts: list[str]) -> tuple[U32, I64]:
    """Hash every run of three words; the last two words of a text begin shorter runs, so that short texts have some.

    Words are runs of letters and digits in lower case; Chinese, Japanese, Thai, Lao and Burmese characters, which are
    written without spaces, are words of their own.

    Returns:
        [W] hash of each run, [W] which text it is from.
    """
    word_W, row_W, _ = hash_words(texts)
    padded = np.zeros(len(word_W) + 2 * len(texts) + 2, dtype=np.uint64)
    place_W = np.arange(len(word_W)) + 2 * row_W
    padded[place_W] = word_W
    run_W = padded[place_W] + mix(padded[place_W + 1], 1) + mix(padded[place_W + 2], 2)
    return (mix(run_W, 3) >> np.uint64(32)).astype(np.uint32), row_W


def hash_words(texts: list[str]) -> tuple[U64, I64, I64]:
    """Hash every word, as a polynomial of its bytes modulo 2**64.

    Returns:
        [W] the hash of each word, [W] which text it is from, [W] the byte of that text, in lower case, it begins at.
    """
    coded = [text.lower().encode() for text in texts]
    byte_B = np.frombuffer(b"\n".join(coded), dtype=np.uint8)
    begins = np.cumsum([0, *(len(text) + 1 for text in coded)])
    inside_B, alone_B = _classify(byte_B)
    start_B = inside_B.copy()
    start_B[1:] &= ~inside_B[:-1] | alone_B[1:]
    start_B[3:] |= inside_B[3:] & alone_B[:-3]
    start_W = np.flatnonzero(start_B)
    if not len(start_W):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    place_B = np.arange(len(byte_B)) - np.repeat(np.append(0, start_W), np.diff(start_W, prepend=0, append=len(byte_B)))
    term_B = POWERS[place_B % len(POWERS)] * (byte_B + np.uint64(1))
    term_B[~inside_B] = 0
    word_W = mix(np.add.reduceat(term_B, start_W), 4)
    row_W = np.searchsorted(begins, start_W, side="right") - 1
    return word_W, row_W.astype(np.int64), (start_W - begins[row_W]).astype(np.int64)


def _classify(byte_B: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Tell the bytes of UTF-8 that belong to words, and those that begin a character of three bytes which is a word."""
    inside_B = LETTERS[byte_B]
    next_B = np.append(byte_B[1:], np.uint8(0))
    mark_B = (byte_B == 0xE2) & ((next_B == 0x80) | (next_B == 0x81))  # U+2000 to U+207F: dashes, quotes, spaces
    for behind in range(3):
        inside_B[behind:] &= ~mark_B[: len(mark_B) - behind]
    alone_B = (byte_B >= 0xE3) & (byte_B <= 0xE9)  # U+3000 to U+9FFF: kana and Han
    alone_B |= (byte_B == 0xE0) & (next_B >= 0xB8) & (next_B <= 0xBB)  # Thai and Lao
    alone_B |= (byte_B == 0xE1) & (next_B >= 0x80) & (next_B <= 0x82)  # Burmese
    return inside_B, alone_B


def _signatures(order: I64, texts: Texts, common: U32) -> tuple[U32, npt.NDArray[np.bool_]]:
    """Return the minima of every row, by rank, and which rows have words at all."""
    rank = np.full(int(order.max(initial=-1)) + 1, -1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    signature_NP = np.zeros((len(order), MINIMA), dtype=np.uint32)
    has_words_N = np.zeros(len(order), dtype=bool)
    for first, batch in texts():
        ranks = rank[first : first + len(batch)]
        used = np.flatnonzero(ranks >= 0)
        if len(used):
            triple_W, row_W = hash_triples([batch[row] for row in used])
            triple_W, row_W = _without(common, triple_W, row_W)
            if len(triple_W):
                begins = np.flatnonzero(np.diff(row_W, prepend=-1))
                rows = ranks[used[row_W[begins]]]
                signature_NP[rows] = take_minima(triple_W, begins)
                has_words_N[rows] = True
    return signature_NP, has_words_N


def _without(common: U32, triple_W: U32, row_W: I64) -> tuple[U32, I64]:
    """Leave out the triples of a template, but for rows that have no more than one word of their own."""
    if not len(common) or not len(triple_W):
        return triple_W, row_W
    place_W = np.minimum(np.searchsorted(common, triple_W), len(common) - 1)
    own_W = common[place_W] != triple_W
    own_R = np.bincount(row_W[own_W], minlength=row_W[-1] + 1) > TRIPLES_OF_A_WORD
    stays_W = own_W | ~own_R[row_W]
    return triple_W[stays_W], row_W[stays_W]


def take_minima(triple_W: U32, begins: I64) -> U32:
    """Return [R, P] the smallest value of each of P scrambled orders over each row's triples.

    Args:
        triple_W: Hashes, rows one after the other.
        begins: [R] where each row begins; no row is empty.
    """
    minimum_RP = np.empty((len(begins), MINIMA), dtype=np.uint32)
    factors = (mix(np.arange(MINIMA, dtype=np.uint64), 5) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    offsets = (mix(np.arange(MINIMA, dtype=np.uint64), 6) >> np.uint64(32)).astype(np.uint32)
    ends = np.append(begins[1:], len(triple_W))
    first = 0
    while first < len(begins):
        upto = max(int(np.searchsorted(ends, begins[first] + BLOCK_WORDS, side="right")), first + 1)
        block = triple_W[begins[first] : ends[upto - 1]]
        inside = begins[first:upto] - begins[first]
        scrambled = np.empty_like(block)
        for place in range(MINIMA):
            np.multiply(block, factors[place], out=scrambled)
            np.add(scrambled, offsets[place], out=scrambled)
            minimum_RP[first:upto, place] = np.minimum.reduceat(scrambled, inside)
        first = upto
    return minimum_RP


def _buckets(signature_NP: U32, has_words_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Return [N, L] which bucket a row is in for each band, numbered over all bands; -1 where it is alone."""
    bucket_NL = np.full((len(signature_NP), BANDS), -1, dtype=np.int32)
    rows = np.flatnonzero(has_words_N)
    upto = 0
    for band in range(BANDS):
        key = np.zeros(len(rows), dtype=np.uint64)
        for place in range(band * BAND_SIZE, (band + 1) * BAND_SIZE):
            key = mix(key ^ signature_NP[rows, place], 7)
        _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        number = np.where(counts > 1, np.cumsum(counts > 1) - 1 + upto, -1)
        bucket_NL[rows, band] = number[inverse]
        upto += int((counts > 1).sum())
    return bucket_NL
