"""A row at either end of a metric's range: what rows that were not drawn may still turn out to be.

Ten rows with equal answers do not prove that all rows have equal answers. So intervals of bounded metrics resample two
more rows, in which one model is as bad as the metric allows and the other as good (`paired_statistics.difference`).
Shapes: M rows of both models, or groups of rows added up; K sums a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmtune.evaluate.paired_statistics import Ends, Floats, share_ends


def mean_share_ends(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(right, counted) of several tasks: a question of the task with the fewest, where one counts most."""
    counted = sums_MK[:, 1::2].sum(0)
    task = 2 * int(np.argmin(counted))
    worst, best = np.zeros((2, sums_MK.shape[1]))
    worst[task + 1] = best[task] = best[task + 1] = 1
    return worst, best


def error_ends(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(errors, reference length): as many errors as the reference is long, or as the worst row has; and none.

    An error rate has no upper end: an answer may go on for ever. The lower bound of the first row is an empty answer.
    """
    length = float(sums_MK[:, 1].mean())
    return np.array([max(length, float(sums_MK[:, 0].max())), length]), np.array([0.0, length])


def chrf_ends(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(answer, reference, match) by order of n-gram: an average reference against no match, and against itself."""
    reference = sums_MK.mean(0)[1::3]
    worst, best = np.repeat(reference, 3), np.repeat(reference, 3)
    worst[2::3] = 0
    return worst, best


def bleu_ends(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(length, reference length, matches by order, n-grams by order): no match, and nothing but matches."""
    length, orders = float(sums_MK[:, 1].mean()), (sums_MK.shape[1] - 2) // 2
    grams = np.maximum(length - np.arange(orders), 0)
    lengths = [length, length]
    return np.concatenate([lengths, 0 * grams, grams]), np.concatenate([lengths, grams, grams])


def found_ends(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(hits, predicted, right): nothing found, and everything, in a row with an average number to find."""
    right = float(sums_MK[:, 2].mean())
    return np.array([0.0, right, right]), np.array([right, right, right])


def class_ends(sums_M3K: Floats) -> tuple[Floats, Floats]:
    """(hits, predicted, right) by class: a row of the rarest class, where one counts most, taken for the commonest."""
    right = np.split(sums_M3K, 3, axis=1)[2].sum(0)
    classes, size = len(right), float(right.sum()) / len(sums_M3K)
    worst, best = np.zeros((2, 3, classes))
    rarest, commonest = int(np.argmin(np.where(right > 0, right, np.inf))), int(np.argmax(right))
    best[:, rarest] = worst[2, rarest] = worst[1, commonest] = size
    return worst.ravel(), best.ravel()


def rank_ends(seen_MK: Floats) -> tuple[Floats, Floats]:
    """(scores, right) by class: a row of the rarest class with the lowest score of it, or the highest."""
    scores, right = np.split(seen_MK, 2, axis=1)
    counts = right.sum(0)
    true = np.arange(len(counts)) == int(np.argmin(np.where(counts > 0, counts, np.inf)))
    low, high = scores.min(0), scores.max(0)
    return np.concatenate([np.where(true, low, high), true]), np.concatenate([np.where(true, high, low), true])


def correlation_ends(seen_M2: Floats) -> tuple[Floats, Floats]:
    """(predicted, reference): the highest reference with the lowest prediction, and with the highest."""
    (low, _), (high, top) = seen_M2.min(0), seen_M2.max(0)
    return np.array([low, top]), np.array([high, top])


ENDS: Mapping[str, Ends] = {
    "share": share_ends,
    "mean of shares": mean_share_ends,
    "errors": error_ends,
    "chrf": chrf_ends,
    "bleu": bleu_ends,
    "found": found_ends,
    "classes": class_ends,
    "ranks": rank_ends,
    "correlation": correlation_ends,
}
"""By the names that they have on disk."""
