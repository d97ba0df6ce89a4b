"""Confidence intervals: one construction for the score of every metric, and for every difference.

Rows get random weights that add up to a constant, drawn uniformly from all such weights (Dirichlet), together with a
pseudo-row: the worst row that the metric allows for one end of the interval, the best one for the other. The ends are
quantiles of the metric under these weights. For a mean of numbers with bounds this is Gaffke's bound ("Three test
statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable", 2005; studied by
Learned-Miller and Thomas, "A New Confidence Interval for the Mean of a Bounded Random Variable", 2020). For shares of
right rows it equals the exact interval of Clopper and Pearson, and for paired right-or-wrong rows its error at zero is
that of McNemar's exact test. Equal rows therefore have an interval as wide as their number allows.

Units may have unequal sizes: groups of rows, or rows with answers of unequal length. A pseudo-row then has the size of
the unit that a random part of the rows is in, so its share of the whole is one in the effective number of units (Kish,
"Survey Sampling", 1965). With the average size, low ends of 200 groups with Zipf's sizes err in 12 of 100 samples.
Shapes: R draws, U units (rows, or groups of rows), P pseudo-units at either end, K sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtune.recipe.evaluate_section import ERROR

Floats = NDArray[np.float64]
Formula = Callable[[Floats], Floats]
"""Maps summed statistics [..., K] to the metric's value [...]."""
Weighted = Callable[[Floats], Floats]
"""Maps the weight of each row [R, N] to the metric's values [R]."""

RESAMPLES = 5000
CHUNK_CELLS = 200_000
"""Weights held at a time: small enough for a CPU cache, large enough for its matrix product."""
UNDEFINED_SHARE = 0.01
"""Share of draws that may lack a value and are skipped."""
FEWEST_UNBOUNDED = 10
"""Units below which a difference without bounds has no interval: its next row may be anything."""
FEWEST_UNSEEN = 72
"""Units below which a score without bounds, or a difference of equal numbers, has none: of this many, a value that
5 % of the rows have is missing by chance in fewer than 2.5 of 100 samples."""
FEWEST_VARIED = 3
"""Units with another number than the most frequent one, below which they show no range."""
BEYOND = 8.0
"""Range added at either end of the seen one, in ranges / U for U units with different numbers: the least that keeps the
error below 5 % for lognormal numbers of sigma 1, from 10 units on."""
SAME = 1e-9
"""Share of the largest number below which numbers differ only by rounding."""


class Interval(NamedTuple):
    """The ends of a 95 % interval; NaN if there is none."""

    low: float = math.nan
    high: float = math.nan


def bound(statistic: Weighted, units: int, ends: int, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Return the interval of a metric with bounds by `bound_all`; with fewer than two units there is none."""
    return bound_all(lambda weights_RU: (statistic(weights_RU),), units, ends, seed, resamples)[0]


def bound_all(
    statistics: Callable[[Floats], Sequence[Floats]], units: int, ends: int, seed: int, resamples: int = RESAMPLES
) -> list[Interval]:
    """Return the interval of each statistic of a metric with bounds, from the same draws.

    `statistics` take the weights [R, units + 2 * ends] of the rows, the pseudo-rows of one end, and those of the other.
    The weights of rows and pseudo-rows add up to `units`.
    """
    drawn = []
    for weights_RU in draw_weights(units + ends, max(units, 1), seed, resamples if units > 1 else 1):
        rows, pseudo, none = weights_RU[:, :units], weights_RU[:, units:], np.zeros((len(weights_RU), ends))
        sides = ([rows, pseudo, none], [rows, none, pseudo])
        drawn.append(np.array([statistics(np.concatenate(parts, axis=1)) for parts in sides]))
    values_2SR = np.concatenate(drawn, axis=2)
    return [cut_tails(values_2SR[:, one]) if units > 1 else Interval() for one in range(values_2SR.shape[1])]


def learn(
    parts_U: Floats,
    seed: int,
    *,
    reach: float = 0.0,
    unchanged: int = 0,
    fewest: int = FEWEST_UNBOUNDED,
    resamples: int = RESAMPLES,
    effective: float = 0.0,
) -> Interval:
    """Return the interval of the mean of numbers without bounds; `effective` is the number of units, if it is smaller.

    The pseudo-rows are at the ends of the seen range, widened by `BEYOND`. Units with the most frequent number, or the
    `unchanged` ones of a difference, do not count there. The interval is at least that of Student's t. If all numbers
    are equal, the range is -`reach` to `reach`. There is no interval with fewer than `fewest` units, nor if only one or
    two vary. No interval of such numbers holds for all distributions: Bahadur and Savage, "The Nonexistence of Certain
    Statistical Procedures in Nonparametric Problems", 1956. This one does not cover values far outside of the range.
    """
    import scipy.stats  # type: ignore[import-untyped]  # takes a third of a second, and training does not need it

    units = len(parts_U)
    evenness = (effective or units) / units
    if evenness * units < fewest or not np.isfinite(parts_U).all():
        return Interval()
    low, high, mean = float(parts_U.min()), float(parts_U.max()), float(parts_U.mean())
    scale = max(abs(low), abs(high), reach)
    most = max(unchanged, int(np.unique(np.round(parts_U / (SAME * scale or 1)), return_counts=True)[1].max()))
    varied = units - most if most > 1 else units
    if varied >= FEWEST_VARIED:
        beyond = (high - low) * BEYOND / (varied * evenness)
        low, high = low - beyond, high + beyond
    elif not varied and reach > SAME * scale and units >= FEWEST_UNSEEN:
        low, high = min(low, -reach), max(high, reach)
    else:
        return Interval()
    with_ends = np.append(parts_U, [low, high])
    interval = bound(lambda weights_RU: weights_RU @ with_ends / units, units, 1, seed, resamples)
    error = float(parts_U.std(ddof=1)) / math.sqrt(units)
    half = float(scipy.stats.t.ppf(1 - ERROR / 2, evenness * units - 1)) * error
    return Interval(min(interval.low, mean - half), max(interval.high, mean + half))


def draw_weights(units: int, total: int, seed: int, resamples: int) -> Iterator[Floats]:
    """Yield weights [R, units] that add up to `total`, some draws at a time, which keeps memory flat in the units."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CHUNK_CELLS // units))
    for start in range(0, resamples, chunk):
        drawn_RU = generator.standard_exponential((min(chunk, resamples - start), units))
        yield drawn_RU * (total / drawn_RU.sum(1, keepdims=True))


def cut_tails(sides: Floats) -> Interval:
    """Return the outer quantiles of the values [2, R] with either kind of pseudo-row."""
    lows, highs = [], []
    for values_R in sides:
        defined = values_R[np.isfinite(values_R)]
        if len(defined) < (1 - UNDEFINED_SHARE) * len(values_R):
            return Interval()
        low, high = np.quantile(defined, [ERROR / 2, 1 - ERROR / 2])
        lows.append(float(low))
        highs.append(float(high))
    return Interval(min(lows), max(highs))


def effective_number(size_U: Floats) -> float:
    """Return the number of equal units with the variance of these unequal ones, by Kish: (sum)^2 / sum of squares."""
    total, squares = float(size_U.sum()), float(size_U @ size_U)
    return total * total / squares if squares else 0.0


def typical_size(size_U: Floats) -> float:
    """Return the size of a pseudo-row: the mean of the units' sizes, weighted by size."""
    total = float(size_U.sum())
    return float(size_U @ size_U) / total if total else 0.0


def pseudo_values(sums_UK: Floats, formula: Formula) -> Floats:
    """Return each unit's part [U] in the metric, its jackknife pseudo-value; their mean is the metric's value."""
    total_K, units = sums_UK.sum(0), len(sums_UK)
    with np.errstate(invalid="ignore"):  # a metric may have no value without one of the units
        parts_U = -(units - 1) * formula(total_K - sums_UK)
        return np.asarray(parts_U - parts_U.mean() + float(formula(total_K)), dtype=np.float64)


def exact_interval(hits: int, rows: int, alpha: float) -> tuple[float, float]:
    """Return the interval of a share: Clopper and Pearson, "The Use of Confidence or Fiducial Limits", 1934."""
    import scipy.stats

    low = float(scipy.stats.beta.ppf(alpha / 2, hits, rows - hits + 1)) if hits else 0.0
    high = float(scipy.stats.beta.ppf(1 - alpha / 2, hits + 1, rows - hits)) if hits < rows else 1.0
    return low, high
