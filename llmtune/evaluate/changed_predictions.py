"""Rows of the test split with the answers of both models, for a person to read: samples, and rows that flipped.

Shapes: N rows.
"""

from __future__ import annotations

import numpy as np

from llmtune.evaluate.eval_inputs import EvalInputs
from llmtune.evaluate.inference import Answers
from llmtune.evaluate.metric import Measure, PairedMeasures
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.records import Flips

MOST_SHOWN = 5
HALF = 0.5
"""What a tie counts."""


def pick_samples(inputs: EvalInputs, base: Answers, tuned: Answers, count: int) -> tuple[dict[str, str], ...]:
    """Return rows side by side, spread evenly over those that were answered; never chosen by how the answers look."""
    shown = list(base.texts or base.scores)
    return tuple(sample_row(shown[at], inputs, base, tuned) for at in cut_evenly(len(shown), count))


def sample_row(i: int, inputs: EvalInputs, base: Answers, tuned: Answers) -> dict[str, str]:
    """Return row `i` with the answers of both models; what only one of them has is absent."""
    sample = {"origin": inputs.origins[i], "prompt": inputs.prompts[i], "reference": inputs.references[i]}
    if i in base.texts and i in tuned.texts:
        sample |= {"base": base.texts[i], "tuned": tuned.texts[i]}
    if i in base.scores:
        sample |= {"base_choice": base.choice(i, inputs.choices), "tuned_choice": tuned.choice(i, inputs.choices)}
    return sample


def find_flips(
    measures: PairedMeasures, inputs: EvalInputs, base: Answers, tuned: Answers, count: int
) -> dict[str, Flips]:
    """Return the rows that one model got right and the other wrong, by right-or-wrong metric.

    A tie, half right, is no flip, and a metric whose base is all ties (rewards against the base itself) is left out. Of
    either way at most `count` rows, and never more than five, are shown, spread evenly over all that flipped.
    """
    flips = {}
    for metric, after in measures.tuned.items():
        before = measures.base.get(metric)
        if not after.right_wrong or before is None or (before.sums_NK[:, 0] == HALF).all():
            continue
        gained, lost = flipped_rows(before, after)
        gained_rows, lost_rows = (
            tuple(sample_row(way[at], inputs, base, tuned) for at in cut_evenly(len(way), min(count, MOST_SHOWN)))
            for way in (gained, lost)
        )
        flips[metric] = Flips(len(gained), len(lost), len(after.at), gained_rows, lost_rows)
    return flips


def flipped_rows(before: Measure, after: Measure) -> tuple[list[int], list[int]]:
    """Return the indexes of the rows that became right, and of those that became wrong."""
    assert before.at == after.at
    moved_N = after.sums_NK[:, 0] - before.sums_NK[:, 0]
    at_N = np.asarray(after.at)
    return at_N[moved_N > HALF].tolist(), at_N[moved_N < -HALF].tolist()
