"""Equal and nearly equal rows, within and across splits. Which rows are kept does not depend on the order of files.

Two texts are near if their sets of word triples overlap by 0.8 (Jaccard), the measure and threshold of Lee et al.,
"Deduplicating Training Data Makes Language Models Better" (2022). The overlap is estimated from 120 minima: Broder, "On
the resemblance and containment of documents" (1997); candidates come from 20 bands of 6 minima: Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4. Pairs at 0.8 become candidates with 99.8 %, at 0.9 nearly always.

Rows made from one template (a long instruction, a short question) overlap by more than 0.8 and still differ. Triples in
a tenth of all rows therefore do not count, except in a row with at most one word outside them.

Only candidates, rows that share a band with another row, keep their minima. Keys, minima and buckets are on disk, so
memory grows by a few bytes per row, however many rows are near each other.

Legend: W words (and word triples, as many), R rows of a batch, N rows, C candidates, P minima, L bands, G buckets.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.data.input_overlap import MOST_WORDS, JsonRows, find_near_pictures, find_shared_inputs, select_rows
from llmtune.data.row_kind import near_text, row_input
from llmtune.data.row_store import Index
from llmtune.data.row_text import NearText, visible_form
from llmtune.data.word_hash import (
    BANDS,
    I64,
    MINIMA,
    U32,
    U64,
    band_keys,
    different_triples,
    hash_triples,
    tag_triples,
    take_minima,
    without_common,
)
from llmtune.data.worker_pool import WorkerPool
from llmtune.records import SPLITS, Row
from llmtune.store.atomic_files import atomic_file

TextOf = Callable[[Row], NearText]
NEAR = 0.8
ENOUGH = round(NEAR * MINIMA)
"""Minimum number of equal minima for near rows."""
LEAST_SHARED = 0.5
"""A row with fewer of its triples in a set of rows is near none of them, however far off the estimate is."""
MARK_SHIFT = 8
SAMPLE_ROWS = 4096
COMMON_SHARE = 0.1
COMMON_ROWS = 20
"""A word triple in a tenth of all rows (and in at least 20) belongs to a template and does not count."""
BUCKET_ROWS = 256
"""How many kept rows a row is compared with per band: a bucket this full contains texts of one template."""
FILE_ROWS = 2**16
"""Rows per file of band keys."""
SHARES = 16
"""Keys are sorted in this many parts, one after the other, to save memory."""
RELEASE_ROWS = 2**10
"""Number of candidates after which mapped file pages are released."""
PRIORITY = np.array([2, 1, 0], dtype=np.int8)
"""Priority of splits: test rows are kept first, then validation, then train."""
KEPT = ""


def drop_equal(index: Index, split_N: npt.NDArray[np.int8], method: str) -> npt.NDArray[np.object_]:
    """Find rows that equal another row: across splits always, within a split unless `method` is none.

    Returns:
        [N] the reason why a row is dropped, or KEPT. Among rows that differ only in Unicode composition or outer white
        space, the one whose bytes have the smallest hash is kept.
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
    """Find rows that are nearly equal to a kept row, and write the reason into `reason_N` in place.

    Test rows come first, then validation, then train; within a split the smallest hash comes first. A row is dropped if
    an earlier kept row is near it. So no two kept rows are near each other, and each dropped row is near a kept one.

    Args:
        index: The rows.
        split_N: [N] index into SPLITS.
        reason_N: [N] why a row was already dropped; otherwise KEPT.
        rows: Yields all rows in order.
        folder: Stores the files of `find_near`; files of the same rows found there are reused.
    """
    for row, near in find_near(_rank(index, split_N, reason_N), rows, folder):
        splits = split_N[near]
        same = splits[np.argmin(PRIORITY[splits])]
        reason_N[row] = "near duplicate" if same == split_N[row] else f"near a {SPLITS[same]} row"


def drop_shared_inputs(
    index: Index, split_N: npt.NDArray[np.int8], reason_N: npt.NDArray[np.object_], rows: JsonRows, folder: Path
) -> None:
    """Find rows whose input or picture is, or nearly is, that of a row of a split with priority, whatever the answers.

    Writes the reason into `reason_N` in place; the arguments are those of `drop_near`.
    """
    train, validation, test = range(len(SPLITS))
    for below, held in ((validation, [test]), (train, [test, validation])):
        kept_N = reason_N == KEPT
        tests = np.concatenate([np.flatnonzero(kept_N & (split_N == split)) for split in held])
        others = np.flatnonzero(kept_N & (split_N == below))
        if not len(tests) or not len(others):
            continue
        matches = find_near_pictures(tests, others, rows) | find_shared_inputs(tests, others, rows).others
        if not row_input(json.loads(next(rows())[1][0].as_py())).labelled:  # else the near search compares these texts
            (keys := folder / SPLITS[below]).mkdir(exist_ok=True)
            left = np.setdiff1d(others, np.array([*matches], dtype=np.int64))
            matches |= {row: int(near[0]) for row, near in match_near(tests, left, rows, keys, input_text)}
        for row, near in matches.items():
            reason_N[row] = f"near a {SPLITS[split_N[near]]} row"


def input_text(row: Row) -> NearText:
    """Return the text of a row's input; none of a short one, which `find_shared_inputs` compares."""
    input_parts = row_input(row)
    long = len(input_parts.query.split()) > MOST_WORDS
    return NearText(visible_form(input_parts.query), input_parts.context()) if long else NearText("")


def _rank(index: Index, split_N: npt.NDArray[np.int8], reason_N: npt.NDArray[np.object_]) -> I64:
    """Return the numbers of the remaining rows, those with priority first."""
    high_N, low_N = index.content.T
    order = np.lexsort((low_N, high_N, PRIORITY[split_N]))
    kept: I64 = order[reason_N[order] == KEPT]
    return kept


def find_near(order: I64, rows: JsonRows, folder: Path) -> Iterator[tuple[int, I64]]:
    """Yield each row that is near an earlier kept row in `order`, with all such rows.

    Args:
        order: [N] numbers of the rows to compare, those with priority first.
        rows: Yields all rows.
        folder: Stores band keys, 170 bytes per row, and 800 bytes per candidate; empty, or from the same rows and
            order.
    """
    kept = _KeptRows(order, rows, folder)
    for rank in range(len(kept.order)):
        near = kept.near(rank)
        if len(near):
            yield int(kept.order[rank]), kept.order[near]
        else:
            kept.add(rank)


def match_near(
    references: I64, queries: I64, rows: JsonRows, folder: Path, text: TextOf = near_text
) -> Iterator[tuple[int, I64]]:
    """Yield each row of `queries` that is near rows of `references`, with those rows; other pairs are not compared.

    Args:
        references: Numbers of rows; each band uses the first 256.
        queries: Numbers of other rows.
        rows: Yields all rows.
        folder: Stores the files of `find_near`; empty, or from the same rows.
        text: Returns the compared text of a row.
    """
    kept = _KeptRows(np.concatenate([references, queries]), rows, folder, queries, text)
    is_query_C = np.isin(kept.order, queries)
    for rank in np.flatnonzero(~is_query_C).tolist():
        kept.add(rank)
    for rank in np.flatnonzero(is_query_C).tolist():
        near = kept.near(rank)
        if len(near):
            yield int(kept.order[rank]), kept.order[near]


class _KeptRows:
    """Kept candidates by bucket, and the search for kept rows near another one; all data is in files."""

    def __init__(
        self, order: I64, rows: JsonRows, folder: Path, queries: I64 | None = None, text: TextOf = near_text
    ) -> None:
        signer = _Signer(text, _common_triples(order, rows, text))
        if queries is not None:
            fewer = min(queries, np.setdiff1d(order, queries), key=len)
            signer = replace(signer, shared=_mark_triples(signer, fewer, rows))
        _write_keys(order, rows, signer, folder)
        alike_N = _find_alike(folder, queries)
        number_C = _read_keys(folder, 0)[alike_N].astype(np.int64)
        taken = np.zeros(int(order.max(initial=-1)) + 1, dtype=bool)
        taken[number_C] = True
        self.order: I64 = order[taken[order]]
        """[C] numbers of the candidates by rank."""
        if not len(self.order):
            return
        self._place_C = np.searchsorted(number_C, self.order)
        self._minimum_CP = _File(_write_minima(number_C, rows, signer, folder), np.uint32, (-1, MINIMA))
        begins, slots = _write_buckets(folder, alike_N, self._place_C)
        self._begin_LC = _File(begins, np.int64, (BANDS, -1))
        self._slots = _File(slots, np.int32, (-1,))
        self._looked_at = 0

    def add(self, rank: int) -> None:
        """Keep a row; a bucket that already has BUCKET_ROWS rows does not take it."""
        slots, begins = self._slots.array, self._begins(rank)
        begins = begins[slots[begins] < BUCKET_ROWS]
        slots[begins] += 1
        slots[begins + slots[begins]] = rank

    def near(self, rank: int) -> I64:
        """Return the kept rows near this one."""
        self._looked_at += 1
        if self._looked_at % RELEASE_ROWS == 0:
            for file in (self._minimum_CP, self._begin_LC, self._slots):
                file.release()
        slots, minimum_CP, begins = self._slots.array, self._minimum_CP.array, self._begins(rank)
        counts = slots[begins]
        shifts = begins + 1 - (np.cumsum(counts) - counts)
        there = slots[np.repeat(shifts, counts) + np.arange(counts.sum())]
        ranks = np.array(sorted(set(there.tolist())), dtype=np.int64)
        if not len(ranks):
            return ranks
        equal_RP = minimum_CP[self._place_C[ranks]] == minimum_CP[self._place_C[rank]]
        near: I64 = ranks[np.count_nonzero(equal_RP, axis=1) >= ENOUGH]
        return near

    def _begins(self, rank: int) -> I64:
        """Return the offset of a row's buckets in the slots: each starts with the count of the ranks that follow."""
        begin_L: I64 = self._begin_LC.array[:, rank]
        return begin_L[begin_L >= 0]


class _File:
    """An array in a file, mapped into memory on demand."""

    def __init__(self, path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.array: npt.NDArray[Any] = np.frombuffer(self._map, dtype).reshape(shape)

    def release(self) -> None:
        """Release its pages; written data stays in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)


def _common_triples(order: I64, rows: JsonRows, text: TextOf) -> U32:
    """Return, sorted, the word triples that many rows share. The sample depends only on the rows."""
    seen: list[U32] = []
    for _, batch in select_rows(order[_sample_places(len(order))], rows):
        triple_W, row_W = hash_triples([text(json.loads(row)).text for row in batch])
        seen.append(different_triples(triple_W, row_W)[0])
    triples, counts = np.unique(np.concatenate(seen or [np.zeros(0, np.uint32)]), return_counts=True)
    sampled = min(len(order), SAMPLE_ROWS)
    return triples[(counts >= COMMON_ROWS) & (counts >= COMMON_SHARE * sampled)]


def _sample_places(count: int) -> I64:
    """Return evenly spaced sample positions in an order that is sorted by split and hash."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, SAMPLE_ROWS)).astype(np.int64))


@dataclass(frozen=True)
class _Signer:
    """Computes the minima of a batch of rows, or their band keys; runs in every process."""

    text: TextOf
    common: U32
    keys: bool = False
    shared: npt.NDArray[np.bool_] | None = None
    """Of `_mark_triples`, if rows are compared with these rows alone: leaves out others that cannot be near them."""

    def triples(self, rows: list[str]) -> tuple[U32, I64]:
        """Return [W] the triples of the rows, without a template's, and [W] the row of each."""
        texts = [self.text(json.loads(row)) for row in rows]
        triple_W, row_W = without_common(self.common, *hash_triples([near.text for near in texts]))
        return tag_triples(triple_W, row_W, [near.tag for near in texts]), row_W

    def __call__(self, batch: tuple[I64, list[str]]) -> tuple[I64, npt.NDArray[Any]]:
        """Return the numbers of the rows that contain words, and [R, P] their minima or [R, L] their keys."""
        numbers, rows = batch
        triple_W, row_W = self.triples(rows)
        if self.shared is not None:
            triple_W, row_W = different_triples(triple_W, row_W)
            share_R = np.bincount(row_W, self.shared[triple_W >> MARK_SHIFT]) / np.maximum(np.bincount(row_W), 1)
            stays_W = (share_R >= LEAST_SHARED)[row_W]
            triple_W, row_W = triple_W[stays_W], row_W[stays_W]
        begins = np.flatnonzero(np.diff(row_W, prepend=-1))
        minimum_RP = take_minima(triple_W, begins)
        return numbers[row_W[begins]], band_keys(minimum_RP) if self.keys else minimum_RP

    def map(self, order: I64, rows: JsonRows) -> Iterator[tuple[I64, npt.NDArray[Any]]]:
        """Yield the results for the rows in `order`, using all cores."""
        return WorkerPool(self).map(select_rows(order, rows), lambda batch: len(batch[1]), len(order))


def _mark_triples(signer: _Signer, numbers: I64, rows: JsonRows) -> npt.NDArray[np.bool_]:
    """Return a table, by the first bits of a triple, of those that occur in the rows with these numbers."""
    marked = np.zeros(2**32 >> MARK_SHIFT, dtype=bool)
    for _, batch in select_rows(numbers, rows):
        marked[signer.triples(batch)[0] >> MARK_SHIFT] = True
    return marked


def _write_keys(order: I64, rows: JsonRows, signer: _Signer, folder: Path) -> None:
    """Write the band keys and numbers of rows into files of [1 + L, R]; resume after existing files."""
    files = sorted(folder.glob("*.npy"))
    done = int(_read_line(files[-1], 0)[-1]) + 1 if files else 0
    waiting: list[U64] = []

    def write() -> None:
        keys_LR = np.ascontiguousarray(np.concatenate(waiting, axis=1))  # each line can be read alone
        with atomic_file(folder / f"{int(keys_LR[0, 0]):012}.npy") as partial, partial.open("wb") as file:
            np.save(file, keys_LR)
        waiting.clear()

    for numbers, keys_RL in replace(signer, keys=True).map(order[order >= done], rows):
        if len(numbers):
            waiting.append(np.concatenate([numbers.astype(np.uint64)[None], keys_RL.T]))
        if sum(part.shape[1] for part in waiting) >= FILE_ROWS:
            write()
    if waiting:
        write()


def _read_keys(folder: Path, line: int) -> U64:
    """Return the numbers of all rows that contain words (line 0), in order, or their keys of a band (line 1 on)."""
    return np.concatenate([np.zeros(0, np.uint64), *(_read_line(file, line) for file in sorted(folder.glob("*.npy")))])


def _read_line(path: Path, line: int) -> U64:
    """Return a line of an array in a file; a memory map would count as used memory."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        (_, columns), _, dtype = np.lib.format.read_array_header_1_0(file)
        file.seek(line * columns * dtype.itemsize, os.SEEK_CUR)
        return np.fromfile(file, dtype, columns)


def _find_alike(folder: Path, queries: I64 | None) -> npt.NDArray[np.bool_]:
    """Return, by line of the keys, which rows share a band with another row, or with one of `queries` if given."""
    query_N = None if queries is None else np.isin(_read_keys(folder, 0).astype(np.int64), queries)
    alike_N = np.zeros(len(_read_keys(folder, 0)), dtype=bool)
    for band in range(BANDS):
        key_N = _read_keys(folder, 1 + band)
        share_N = (key_N % np.uint64(SHARES)).astype(np.uint8)
        for share in range(SHARES):
            places = np.flatnonzero(share_N == share)
            places = places[np.argsort(key_N[places])]
            equal = np.diff(key_N[places]) == 0
            places = places[np.append(equal, False) | np.append(False, equal)] if len(places) else places
            if query_N is not None:
                places = places[np.isin(key_N[places], key_N[places[query_N[places]]])]
            alike_N[places] = True
    return alike_N


def _write_minima(number_C: I64, rows: JsonRows, signer: _Signer, folder: Path) -> Path:
    """Write the minima of the candidates [C, P] in the order of their numbers, unless the file exists."""
    path = folder / "minima"
    if not path.exists():
        with atomic_file(path) as partial, partial.open("wb") as file:
            for _, minimum_RP in signer.map(number_C, rows):
                file.write(minimum_RP.tobytes())
    return path


def _write_buckets(folder: Path, alike_N: npt.NDArray[np.bool_], place_C: I64) -> tuple[Path, Path]:
    """Write, by rank, the start of each candidate's bucket [L, C], -1 if it is alone, and the buckets' space."""
    upto = 0
    paths = folder / "begins", folder / "slots"
    with paths[0].open("wb") as begins, paths[1].open("wb") as slots:
        for band in range(BANDS):
            key_C = _read_keys(folder, 1 + band)[alike_N][place_C]
            _, bucket_C, count_G = np.unique(key_C, return_inverse=True, return_counts=True)
            size_G = np.where(count_G > 1, np.minimum(count_G, BUCKET_ROWS) + 1, 0)  # one slot for the count
            begin_G = np.where(count_G > 1, np.cumsum(size_G) - size_G + upto, -1)
            begins.write(begin_G[bucket_C].astype(np.int64).tobytes())
            slots.write(np.zeros(int(size_G.sum()), np.int32).tobytes())
            upto += int(size_G.sum())
    return paths
