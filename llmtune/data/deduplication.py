"""Equal and nearly equal rows, on one side and across sides; what stays does not depend on the order of files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmtune.data.minhash import Texts, find_near
from llmtune.data.row_store import Index
from llmtune.records import SIDES

PRIORITY = np.array([2, 1, 0], dtype=np.int8)
"""By side: what stands in test is kept first, then validation, then train."""

KEPT = ""


def drop_equal(index: Index, side_N: npt.NDArray[np.int8], method: str) -> npt.NDArray[np.object_]:
    """Find rows that equal another: across sides always, on one side unless `method` is none.

    Returns:
        [N] the reason why a row is dropped, or KEPT. Of rows that are equal but for composition and outer white space,
        the one whose bytes have the smallest hash stays.
    """
    reason_N = np.full(len(index), KEPT, dtype=object)
    high_N, low_N = index.content.T
    priority_N = PRIORITY[side_N]
    order = np.lexsort((index.text, priority_N, low_N, high_N))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (high_N[order[1:]] != high_N[order[:-1]]) | (low_N[order[1:]] != low_N[order[:-1]])
    first_of = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    across = side_N[order] != side_N[first_of]
    for side, name in enumerate(SIDES):
        reason_N[order[across & (side_N[first_of] == side)]] = f"equal to a {name} row"
    if method != "none":
        reason_N[order[~across & ~new]] = "exact duplicate"
    return reason_N


def drop_near(index: Index, side_N: npt.NDArray[np.int8], reason_N: npt.NDArray[np.object_], texts: Texts) -> None:
    """Find rows that are nearly another that is kept, and write the reason into `reason_N` in place.

    Test rows come first, then validation, then train, and on a side the smallest hash: a row is dropped if a row before
    it that was kept is near. So no two kept rows are near each other, and each dropped row is near a kept one.

    Args:
        index: The rows.
        side_N: [N] index into SIDES.
        reason_N: [N] why a row was dropped already; KEPT where it was not.
        texts: Gives the texts of all rows in order, in batches, each with the number of its first row.
    """
    kept = np.flatnonzero(reason_N == KEPT)
    priority = PRIORITY[side_N[kept]]
    high, low = index.content[kept].T
    order = kept[np.lexsort((low, high, priority))]
    for row, near in find_near(order, texts).items():
        sides = side_N[near]
        same = sides[np.argmin(PRIORITY[sides])]
        reason_N[row] = "near duplicate" if same == side_N[row] else f"near a {SIDES[same]} row"
