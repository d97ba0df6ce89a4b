"""Rows that one model got right and the other wrong: how many each way, and a few of them to read.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmtune.evaluate.eval_inputs import Plan
from llmtune.evaluate.inference import Answers
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.sample_rows import show_row
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.records import Flips

MOST_SHOWN = 5
HALF = 0.5
"""What a tie counts."""


def find_flips(
    bases: Mapping[str, Measure], tunes: Mapping[str, Measure], plan: Plan, base: Answers, tuned: Answers, wanted: int
) -> dict[str, Flips]:
    """Return the flips of every right-or-wrong metric that both models have; a tie, half right, is no flip.

    A metric whose base is all ties (rewards against the base itself) is left out. Of either way at most `wanted` rows,
    and never more than five, are shown, spread evenly over all that flipped.
    """
    found = {}
    for metric, after in tunes.items():
        if not after.right_wrong or metric not in bases or (bases[metric].sums_NK[:, 0] == HALF).all():
            continue
        gained, lost = flipped(bases[metric], after)
        shown = [
            tuple(show_row(way[at], plan, base, tuned) for at in cut_evenly(len(way), min(wanted, MOST_SHOWN)))
            for way in (gained, lost)
        ]
        found[metric] = Flips(len(gained), len(lost), len(after.at), shown[0], shown[1])
    return found


def flipped(before: Measure, after: Measure) -> tuple[list[int], list[int]]:
    """Return the rows, by index into the plan, that became right, and those that became wrong."""
    assert before.at == after.at
    moved_N = after.sums_NK[:, 0] - before.sums_NK[:, 0]
    at_N = np.asarray(after.at)
    return at_N[moved_N > HALF].tolist(), at_N[moved_N < -HALF].tolist()
