"""Statistics of selective prediction: which answers to trust, sets of answers, and bounds for unusual inputs.

Shapes: N rows, K labels, M right labels of all rows, G thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.paired_statistics import POWER
from llmtune.store.score_records import Threshold

FIRST_SHARE = 10
"""The first threshold keeps a tenth of the rows: fewer would stop at the first chance error, more would give up on
tasks with few certain answers."""
STEPS = 100
"""Thresholds at most a hundredth of the rows apart; each further one is a chance to stop early."""
MOST_ROWS = 20_000
ROUNDING = 1e-9


def prove_risk(confidence_N: Floats, wrong_N: NDArray[np.bool_], risk: float, confidence: float) -> Threshold:
    """Return the lowest confidence from which answers are wrong in at most `risk` of the cases, at this `confidence`.

    Learn-then-Test with fixed-sequence testing: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test", 2021.
    Thresholds go from the most confident rows down. Each is tested by the exact probability of as few errors among the
    rows above it, if their true error rate were `risk`. The first threshold that fails ends the sequence, so no
    correction for the number of thresholds is needed. Equal confidences are decided together. The thresholds are ranks
    of the rows' own confidences; this is exact if the error rate does not fall as the threshold is lowered.
    Without a threshold that passes, `value` is None: no answer can be trusted.
    """
    from scipy.special import bdtr  # type: ignore[import-untyped]  # late, as in `paired_statistics`

    rows = len(confidence_N)
    first = max(least_rows(risk, confidence), math.ceil(rows / FIRST_SHARE))
    if first > rows:
        return Threshold(risk, confidence, None, rows, 0, 0)
    ranked_N = np.sort(confidence_N)[::-1]
    errors_N = np.cumsum(wrong_N[np.argsort(-confidence_N, kind="stable")])
    ranks_G = np.array([*range(first, rows, max(1, rows // STEPS)), rows])
    kept_G = np.searchsorted(-ranked_N, -ranked_N[ranks_G - 1], side="right")  # with all equal confidences
    fails_G = bdtr(errors_N[kept_G - 1], kept_G, risk) > 1 - confidence
    passed = int(fails_G.argmax()) if fails_G.any() else len(fails_G)
    if not passed:
        return Threshold(risk, confidence, None, rows, 0, 0)
    kept = int(kept_G[passed - 1])
    return Threshold(risk, confidence, float(ranked_N[kept - 1]), rows, kept, int(errors_N[kept - 1]))


def least_rows(risk: float, confidence: float) -> int:
    """Return how many decided rows without any error prove the risk: (1 - risk)^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-risk) - ROUNDING)


def rows_to_prove(risk: float, confidence: float, error: float) -> int | None:
    """Return how many decided rows prove the risk with 80 % power if `error` of them are wrong; None if too many do."""
    from scipy.special import bdtr

    errors = 0
    for rows in range(least_rows(risk, confidence), MOST_ROWS):
        while bdtr(errors + 1, rows, risk) <= 1 - confidence:
            errors += 1
        if bdtr(errors, rows, error) >= POWER:
            return rows
    return None


def highest_bound(values_M: Floats, weights_M: Floats, rows: int, miss: float) -> float:
    """Return the highest bound below which at most `miss` of a new row's weight is expected; -inf if none is.

    `values_M` are the numbers of N = `rows` rows that should stay at or above the bound. A row's weights add up to at
    most 1. With one value of weight 1 per row this is split conformal prediction with its finite-sample quantile: Vovk,
    Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005. With several it is conformal risk control:
    Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal Risk Control", 2022.
    """
    allowed = miss * (rows + 1) - 1 + ROUNDING
    order_M = np.argsort(values_M, kind="stable")
    over_M = np.cumsum(weights_M[order_M]) > allowed
    if allowed < 0:
        return -math.inf
    return float(values_M[order_M[over_M.argmax()]]) if over_M.any() else math.inf


def fit_sets(
    probability_NK: Floats, right_NK: NDArray[np.bool_], coverage: float, missed: int = 0, *, per_class: bool
) -> tuple[float, ...]:
    """Return the probability [K] from which each label belongs to a row's set.

    Rows with one right label: the set has it in at least `coverage` of new rows. Rows with several: of a new row's
    right labels the set is expected to miss at most 1 - `coverage` (false negative rate; a row without any misses
    none). With `per_class` (Mondrian) the guarantee holds for each label among the rows that it is right for.
    `missed` rows have a right label that is none of the labels: no set has it.
    """
    miss, labels = 1 - coverage, right_NK.shape[1]
    if per_class:
        values = [probability_NK[right_NK[:, k], k] for k in range(labels)]
        bounds = [highest_bound(one, np.ones(len(one)), len(one), miss) for one in values]
    else:
        row_M, label_M = np.nonzero(right_NK)
        weights_M = 1 / right_NK.sum(1)[row_M]
        values_M = np.concatenate([np.full(missed, -math.inf), probability_NK[row_M, label_M]])
        weights_M = np.concatenate([np.ones(missed), weights_M])
        bounds = [highest_bound(values_M, weights_M, len(right_NK), miss)] * labels
    return tuple(min(1.0, max(0.0, bound)) for bound in bounds)


def read_sets(probability_NK: Floats, bounds_K: Sequence[float], *, many: bool) -> NDArray[np.bool_]:
    """Return which labels belong to each row's set [N, K]; if one label is right, the likeliest always does."""
    chosen_NK = probability_NK >= np.asarray(bounds_K)
    if not many:
        chosen_NK[np.arange(len(chosen_NK)), probability_NK.argmax(1)] = True
    return chosen_NK


def risk_curve(confidence_N: Floats, wrong_N: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Return the error rate of the most confident rows by their share of all rows, at each distinct confidence."""
    order_N = np.argsort(-confidence_N, kind="stable")
    kept_N = np.arange(1, len(order_N) + 1)
    rate_N, ranked_N = np.cumsum(wrong_N[order_N]) / kept_N, confidence_N[order_N]
    ends = np.flatnonzero(np.append(ranked_N[1:] != ranked_N[:-1], True))
    return tuple((float(kept_N[i] / len(order_N)), float(rate_N[i])) for i in ends)
