"""Simulated series of models that are compared with one champion on the same test rows, with known truth.

Shapes: N rows, M models of a series, T series, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import nct, t

from llmtune.evaluate.intervals import BEYOND, draw_weights

Floats = NDArray[Any]
ROWS, LOOKS, SERIES, RESAMPLES = 300, 50, 1000, 600
KINDS = ("right or wrong", "losses")
ANEW = 0.4
"""Share of answers that are independent of the champion's, though equally often right."""


@dataclass(frozen=True)
class Shares:
    """How often `X.low > champion` passes, fails and inconclusive."""

    passed: float
    failed: float
    unsure: float


def draw_series(kind: str, generator: np.random.Generator, models: int, true: float = 0.0) -> Floats:
    """Draw each model's difference from the champion on each row, [N, M], with mean `true`.

    The champion's score on a row is the same for all models, so their differences are correlated.
    """
    if kind == "losses":
        own = generator.gamma(1, 0.5, (ROWS, 1))
        return generator.gamma(1, 0.5, (ROWS, models)) - own + true
    easy = 0.3 + 0.6 * generator.random((ROWS, 1))  # the probability of a right answer to each row
    champion = generator.random((ROWS, 1)) < easy
    anew = generator.random((ROWS, models)) < ANEW
    return np.where(anew, generator.random((ROWS, models)) < easy + true / ANEW, champion).astype(float) - champion


def measure_ends(change_NM: Floats, kind: str, looks: int) -> tuple[Floats, Floats]:
    """Return the ends of each model's interval [M], computed as by `difference` and `widen`, for all models at once."""
    value_M, free, ends = change_NM.mean(0), ROWS - 1, (-1.0, 1.0)  # pseudo-rows of either disagreement
    error_M = t.ppf(0.975, free) * change_NM.std(0, ddof=1) / math.sqrt(ROWS) * (kind == "losses")
    if kind == "losses":
        beyond = np.ptp(change_NM, axis=0) * BEYOND / ROWS
        ends = (change_NM.min(0) - beyond, change_NM.max(0) + beyond)
    weights_RN = resamples()
    rows_RM, pseudo_R1 = weights_RN[:, :-1] @ change_NM, weights_RN[:, -1:]
    low_M, high_M = (
        np.quantile((rows_RM + pseudo_R1 * end) / ROWS, q, axis=0) for q, end in zip((0.025, 0.975), ends, strict=True)
    )
    low_M, high_M = np.minimum(low_M, value_M - error_M), np.maximum(high_M, value_M + error_M)
    wider = t.ppf(1 - 0.025 / looks, free) / t.ppf(0.975, free)
    return value_M + (low_M - value_M) * wider, value_M + (high_M - value_M) * wider


def mean_deviation(kind: str) -> float:
    """Return the deviation of a row's difference that gives intervals of this width, as gates plan with."""
    low_M, high_M = measure_ends(draw_series(kind, np.random.default_rng(1), 50), kind, 1)
    return float((high_M - low_M).mean() / 2 * math.sqrt(ROWS) / t.ppf(0.975, ROWS - 1))


@cache
def resamples() -> Floats:
    """Return the same weights for all series; rows are new in each series, so series stay independent."""
    return np.concatenate(list(draw_weights(ROWS + 1, ROWS, 0, RESAMPLES)))


@cache
def first_alarms(kind: str) -> tuple[Floats, Floats]:
    """Return the number of the first false alarm in each series [T], from 1; no model truly differs.

    A number above the last model means none. First with the error shared among 50, then with 5 % for each.
    """
    generator, found = np.random.default_rng(5), []
    for _ in range(SERIES):
        change_NM = draw_series(kind, generator, LOOKS)
        found.append([first_outside(measure_ends(change_NM, kind, looks)) for looks in (LOOKS, 1)])
    shared_T, alone_T = np.asarray(found).T
    return shared_T, alone_T


def first_outside(ends: tuple[Floats, Floats]) -> int:
    """Return the number of the first interval that excludes zero."""
    low_M, high_M = ends
    outside = np.flatnonzero((low_M > 0) | (high_M < 0))
    return int(outside[0]) + 1 if len(outside) else len(low_M) + 1


def share_outcomes(kind: str, true: float) -> Shares:
    """Return how often one model passes, fails and inconclusive at the level of one of 50 looks, over all series."""
    generator, low, high = np.random.default_rng(6), [], []
    for _ in range(SERIES):
        low_M, high_M = measure_ends(draw_series(kind, generator, 1, true), kind, LOOKS)
        low.append(low_M[0])
        high.append(high_M[0])
    passed, failed = float(np.mean(np.asarray(low) > 0)), float(np.mean(np.asarray(high) < 0))
    return Shares(passed, failed, 1 - passed - failed)


def compute_shares(deviation: float, true: float) -> Shares:
    """Return the shares of a paired t test at that level."""
    free, centre = ROWS - 1, true * math.sqrt(ROWS) / deviation
    limit = t.ppf(1 - 0.025 / LOOKS, free)
    passed, failed = float(nct.sf(limit, free, centre)), float(nct.cdf(-limit, free, centre))
    return Shares(passed, failed, 1 - passed - failed)
