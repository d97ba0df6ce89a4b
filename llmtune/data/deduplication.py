"""Equal and nearly equal rows, in one split and across splits; what stays does not depend on the order of files.

Two texts are near if their sets of word triples overlap by 0.8 (Jaccard), the measure and threshold of Lee et al.,
"Deduplicating Training Data Makes Language Models Better" (2022). The overlap is estimated from 120 minima: Broder, "On
the resemblance and containment of documents" (1997); candidates come from 20 bands of 6 minima: Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4. Pairs at 0.8 become candidates with 99.8 %, at 0.9 nearly always; the
estimate's standard deviation at 0.8 is 0.037.

Rows of one template (a long instruction, a short question) overlap by more than that and are not alike, so triples that
a tenth of the rows share do not count, unless a row has no more than a word besides them.

Minima are kept of rows that share a band with another row alone. Which those are is found out by the bands' keys, which
stand on disk; then the minima of these rows are computed again.

Legend: W words (and word triples, as many), R rows of a batch, N rows, P minima, L bands, G buckets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.data.minhash import BAND_SIZE, BANDS, I64, MINIMA, U32, U64, band_keys, hash_triples, take_minima, without
from llmtune.data.row_hash import spoken_text
from llmtune.data.spool import Index
from llmtune.data.worker_pool import WorkerPool
from llmtune.records import SPLITS

JsonRows = Callable[[], Iterator[tuple[int, list[str]]]]
"""Gives all rows, as JSON, in batches, each with the number of its first."""

NEAR = 0.8
SAMPLE_ROWS = 4096
COMMON_SHARE = 0.1
COMMON_ROWS = 20
"""A word triple in a tenth of all rows (and in 20 at least) is part of a template, and does not count."""
BUCKET_ROWS = 256
"""Kept rows to which a row is compared for one band: a bucket as full as this holds texts of one template."""
FILE_ROWS = 2**16
"""Rows of which a file holds the band keys."""
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


def drop_near(
    index: Index, split_N: npt.NDArray[np.int8], reason_N: npt.NDArray[np.object_], rows: JsonRows, folder: Path
) -> None:
    """Find rows that are nearly another that is kept, and write the reason into `reason_N` in place.

    Test rows come first, then validation, then train, and in a split the smallest hash: a row is dropped if one before
    it that was kept is near. So no two kept rows are near each other, and each dropped row is near a kept one.

    Args:
        index: The rows.
        split_N: [N] index into SPLITS.
        reason_N: [N] why a row was dropped already; KEPT where it was not.
        rows: Gives all rows in order.
        folder: Takes the band keys, 170 bytes a row; those of the same rows that are in it are not computed again.
    """
    kept = np.flatnonzero(reason_N == KEPT)
    priority = PRIORITY[split_N[kept]]
    high, low = index.content[kept].T
    order = kept[np.lexsort((low, high, priority))]
    for row, near in find_near(order, rows, folder).items():
        splits = split_N[near]
        same = splits[np.argmin(PRIORITY[splits])]
        reason_N[row] = "near duplicate" if same == split_N[row] else f"near a {SPLITS[same]} row"


class _KeptRows:
    """Rows that are kept, by bucket, and the search for those that are near another row."""

    def __init__(self, signature_NP: U32, bucket_NL: npt.NDArray[np.int32]) -> None:
        self._signature_NP = signature_NP
        self._bucket_NL = bucket_NL
        self._size_G = np.minimum(np.bincount(bucket_NL[bucket_NL >= 0]), BUCKET_ROWS)
        self._begin_G = np.cumsum(self._size_G) - self._size_G
        self._count_G = np.zeros(len(self._size_G), dtype=np.int32)
        self._rows = np.zeros(int(self._size_G.sum()), dtype=np.int32)
        """Those of each bucket from its begin on, as many as its count says."""

    def add(self, rank: int) -> None:
        """Keep a row; a bucket as full as BUCKET_ROWS takes no more."""
        buckets = self._buckets(rank)
        buckets = buckets[self._count_G[buckets] < self._size_G[buckets]]
        self._rows[self._begin_G[buckets] + self._count_G[buckets]] = rank
        self._count_G[buckets] += 1

    def near(self, rank: int) -> I64:
        """Return the kept rows that are near a row."""
        buckets = self._buckets(rank)
        begins, ends = self._begin_G[buckets], self._begin_G[buckets] + self._count_G[buckets]
        parts = [self._rows[begin:end].tolist() for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        rows = np.array(sorted(set().union(*parts)), dtype=np.int64)
        if not len(rows):
            return rows
        near: I64 = rows[(self._signature_NP[rows] == self._signature_NP[rank]).mean(axis=1) >= NEAR]
        return near

    def _buckets(self, rank: int) -> npt.NDArray[np.int32]:
        bucket_L: npt.NDArray[np.int32] = self._bucket_NL[rank]
        return bucket_L[bucket_L >= 0]


def find_near(order: I64, rows: JsonRows, folder: Path) -> dict[int, I64]:
    """Find the rows that are near a row that comes before them in `order` and is kept.

    Args:
        order: [N] numbers of the rows that take part, those first that are to be kept first.
        rows: Gives all rows.
        folder: Takes the band keys; empty, or those of the same rows and order.

    Returns:
        Dropped row -> the kept rows that it is near to.
    """
    common = _common_triples(order, rows)
    _write_keys(order, rows, common, folder)
    order = _alike(order, folder)
    signature_NP = _signatures(order, rows, common)
    kept = _KeptRows(signature_NP, _buckets(signature_NP))
    dropped: dict[int, I64] = {}
    for rank in range(len(order)):
        near = kept.near(rank)
        if len(near):
            dropped[int(order[rank])] = order[near]
        else:
            kept.add(rank)
    return dropped


def match_near(known: I64, queries: I64, rows: JsonRows, folder: Path) -> dict[int, I64]:
    """Find the rows of `queries` that are near rows of `known`, and name those; other pairs are not looked at.

    Args:
        known: Numbers of rows, of which each band of minima holds the first 256.
        queries: Numbers of other rows.
        rows: Gives all rows.
        folder: Takes the band keys; empty.
    """
    order = np.concatenate([known, queries])
    common = _common_triples(order, rows)
    _write_keys(order, rows, common, folder)
    order = _alike(order, folder, queries)
    signature_NP = _signatures(order, rows, common)
    is_query_N = np.isin(order, queries)
    kept = _KeptRows(signature_NP, _buckets(signature_NP))
    for rank in np.flatnonzero(~is_query_N).tolist():
        kept.add(rank)
    matches = ((int(order[rank]), order[kept.near(rank)]) for rank in np.flatnonzero(is_query_N).tolist())
    return {row: near for row, near in matches if len(near)}


def _common_triples(order: I64, rows: JsonRows) -> U32:
    """Return, sorted, the word triples that stand in many rows, seen in a sample that depends on the rows alone."""
    seen: list[U32] = []
    for _, batch in _select(order[_spread(len(order))], rows):
        triple_W, row_W = hash_triples([spoken_text(json.loads(row)) for row in batch])
        pairs = np.unique((row_W.astype(np.uint64) << np.uint64(32)) | triple_W)
        seen.append(pairs.astype(np.uint32))
    triples, counts = np.unique(np.concatenate(seen or [np.zeros(0, np.uint32)]), return_counts=True)
    sampled = min(len(order), SAMPLE_ROWS)
    return triples[(counts >= COMMON_ROWS) & (counts >= COMMON_SHARE * sampled)]


def _select(order: I64, rows: JsonRows) -> Iterator[tuple[I64, list[str]]]:
    """Yield the rows that are in `order`, as they stand, in batches, with their numbers."""
    taken = np.zeros(int(order.max(initial=-1)) + 1, dtype=bool)
    taken[order] = True
    for first, batch in rows():
        places = np.flatnonzero(taken[first : first + len(batch)])
        if len(places):
            yield first + places, [batch[place] for place in places.tolist()]


def _spread(count: int) -> I64:
    """Places of the sample in an order that is by split and hash: evenly over it."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, SAMPLE_ROWS)).astype(np.int64))


class _Signer:
    """Computes the minima of a batch of rows, or the keys of their bands; runs in every process."""

    def __init__(self, common: U32, keys: bool) -> None:
        self._common = common
        self._keys = keys

    def __call__(self, batch: tuple[I64, list[str]]) -> tuple[I64, npt.NDArray[Any]]:
        """Return the numbers of the rows that have words, and [R, P] their minima or [R, L] keys."""
        numbers, rows = batch
        triple_W, row_W = hash_triples([spoken_text(json.loads(row)) for row in rows])
        triple_W, row_W = without(self._common, triple_W, row_W)
        begins = np.flatnonzero(np.diff(row_W, prepend=-1))
        minimum_RP = take_minima(triple_W, begins)
        return numbers[row_W[begins]], band_keys(minimum_RP) if self._keys else minimum_RP

    def map(self, order: I64, rows: JsonRows) -> Iterator[tuple[I64, npt.NDArray[Any]]]:
        """Yield the results of the rows that are in `order`, on all cores."""
        return WorkerPool(self).map(_select(order, rows), lambda batch: len(batch[1]), len(order))


def _write_keys(order: I64, rows: JsonRows, common: U32, folder: Path) -> None:
    """Write the band keys of rows into files of [1 + L, R], with the rows' numbers; go on behind those that exist."""
    files = sorted(folder.glob("*.npy"))
    done = int(np.load(files[-1], mmap_mode="r")[0, -1]) + 1 if files else 0
    waiting: list[U64] = []

    def write() -> None:
        keys_LR = np.concatenate(waiting, axis=1)
        path = folder / f"{int(keys_LR[0, 0]):012}.npy"
        with path.with_suffix(".partial").open("wb") as file:
            np.save(file, keys_LR)
        path.with_suffix(".partial").replace(path)
        waiting.clear()

    for numbers, keys_RL in _Signer(common, keys=True).map(order[order >= done], rows):
        if len(numbers):
            waiting.append(np.concatenate([numbers.astype(np.uint64)[None], keys_RL.T]))
        if sum(part.shape[1] for part in waiting) >= FILE_ROWS:
            write()
    if waiting:
        write()


def _alike(order: I64, folder: Path, queries: I64 | None = None) -> I64:
    """Return, in order, the rows that share a band with another row; with `queries`, with one of these (or are one)."""
    files = sorted(folder.glob("*.npy"))

    def read(line: int) -> U64:
        return np.concatenate([np.zeros(0, np.uint64), *(np.load(file, mmap_mode="r")[line] for file in files)])

    number_N = read(0).astype(np.int64)
    query_N = None if queries is None else np.isin(number_N, queries)
    alike_N = np.zeros(len(number_N), dtype=bool)
    for band in range(BANDS):
        key_N = read(1 + band)
        places = np.argsort(key_N)
        equal = np.diff(key_N[places]) == 0
        places = places[np.append(equal, False) | np.append(False, equal)] if len(places) else places
        if query_N is not None:
            places = places[np.isin(key_N[places], key_N[places[query_N[places]]])]
        alike_N[places] = True
    taken = np.zeros(int(order.max(initial=-1)) + 1, dtype=bool)
    taken[number_N[alike_N]] = True
    return order[taken[order]]


def _signatures(order: I64, rows: JsonRows, common: U32) -> U32:
    """Return the minima of rows by their place in `order`; each has words."""
    rank = np.zeros(int(order.max(initial=-1)) + 1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    signature_NP = np.zeros((len(order), MINIMA), dtype=np.uint32)
    for numbers, minimum_RP in _Signer(common, keys=False).map(order, rows):
        signature_NP[rank[numbers]] = minimum_RP
    return signature_NP


def _buckets(signature_NP: U32) -> npt.NDArray[np.int32]:
    """Return [N, L] which bucket a row is in for each band, numbered over all bands; -1 where it is alone."""
    bucket_NL = np.full((len(signature_NP), BANDS), -1, dtype=np.int32)
    upto = 0
    for band in range(BANDS):
        key_N = band_keys(signature_NP[:, band * BAND_SIZE : (band + 1) * BAND_SIZE])[:, 0]
        _, inverse, counts = np.unique(key_N, return_inverse=True, return_counts=True)
        number = np.where(counts > 1, np.cumsum(counts > 1) - 1 + upto, -1)
        bucket_NL[:, band] = number[inverse]
        upto += int((counts > 1).sum())
    return bucket_NL
