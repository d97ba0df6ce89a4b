"""Splits: a row goes to train, validation or test by a hash, so that it stays where it is when the data grows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmtune.data.row_store import U64
from llmtune.data.spool import Index
from llmtune.errors import DataError
from llmtune.records import SPLITS

TRAIN, VALIDATION, TEST = range(len(SPLITS))


def mix(values: U64, salt: int) -> U64:
    """Scatter 64-bit numbers so that results with different salts are independent.

    The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    mixed = values + np.uint64((salt * 0x9E3779B97F4A7C15) % 2**64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def fraction(values: U64, salt: int) -> npt.NDArray[np.float64]:
    """Map 64-bit hashes to numbers in [0, 1)."""
    return (mix(values, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def assign_splits(index: Index, validation: float, test: float) -> tuple[npt.NDArray[np.int8], list[str]]:
    """Give every row its split.

    A group's position in [0, 1) is a hash; test takes the positions below `test`, validation the next. Where test has
    sources of its own, validation takes the highest. A share that would get nothing, which happens with few rows, gets
    the next group instead.

    Args:
        index: The rows.
        validation: Share of the groups, 0 if there is to be none or it has sources of its own.
        test: The same for test.

    Returns:
        [N] index into SPLITS, and notes for a person.

    Raises:
        DataError: There are not enough groups for one on each split.
    """
    split_N = index.split.copy()
    open_N = split_N < 0
    position_N = fraction(index.group[open_N], salt=1)
    if (split_N == TEST).any():  # they may be what a share took before, the lowest: validation would lose all its rows
        position_N = 1 - position_N
    positions = np.unique(position_N)
    requested = [(split, share) for split, share in ((TEST, test), (VALIDATION, validation)) if share > 0]
    if requested and len(positions) < len(requested) + 1:
        raise _too_few(len(positions), requested)
    notes: list[str] = []
    ends: list[int] = []
    first, upto = 0, 0.0
    for split, share in requested:
        upto += share
        last = max(int(np.searchsorted(positions, upto)), first)
        if last == first:
            last = first + 1
            notes.append(f"a share of {share:g} of {len(positions)} rows gave {SPLITS[split]} none; it got one")
        ends.append(last)
        first = last
    if requested and first >= len(positions):
        raise _too_few(len(positions), requested)
    open_split_N = np.full(len(position_N), TRAIN, dtype=np.int8)
    for (split, _), end in reversed([*zip(requested, ends, strict=True)]):
        open_split_N[position_N < positions[end]] = split
    split_N[open_N] = open_split_N
    return split_N, notes


def _too_few(groups: int, requested: list[tuple[int, float]]) -> DataError:
    names = " and ".join(f"{SPLITS[split]} ({share:g})" for split, share in requested)
    what = f"{groups} different rows (or `split_by` values) are too few to leave some for {names} besides train"
    fix = "Give more rows, or sources of their own, or set the share to 0. A short text file is one row."
    return DataError(*DataError.of(what, "data.train", fix).problems)


def count_copies(index: Index, split_N: npt.NDArray[np.int8], weights: list[float]) -> npt.NDArray[np.int64]:
    """Say how often each row stands in its split: a train row as often as its source's weight says, others once.

    A weight of 2.3 is two copies of each row and a third of three tenths of them, chosen by hash.
    """
    weight_N = np.asarray(weights, dtype=np.float64)[index.source]
    whole_N = np.floor(weight_N)
    more_N = fraction(index.content[:, 1], salt=2) < weight_N - whole_N
    return np.where(split_N == TRAIN, whole_N + more_N, 1).astype(np.int64)


def drop_shared_groups(
    index: Index, split_N: npt.NDArray[np.int8], reason_N: npt.NDArray[np.object_], split_by: str
) -> None:
    """Drop rows whose `split_by` value stands in a source that was given for test or validation, in place."""
    for split, below in ((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,))):
        given = index.group[index.split == split]
        shared = np.isin(index.group, given) & np.isin(split_N, below) & (reason_N == "")
        reason_N[shared] = f"same {split_by} as a {SPLITS[split]} row"
