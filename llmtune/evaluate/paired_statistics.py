"""Paired statistics on the rows that both models answered: an interval and a p-value for tuned minus base.

Nearly every metric is a formula over per-row sums (nats and tokens, right answers and answers, n-gram counts). One
set of weights therefore serves means, ratios and corpus scores. Rank metrics have no such sums; they depend on the
weight of each row. Shapes: R draws, N rows, U rows or groups of rows, K sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from llmtune.evaluate.intervals import (
    CHUNK_CELLS,
    FEWEST_UNBOUNDED,
    FEWEST_UNSEEN,
    RESAMPLES,
    UNDEFINED_SHARE,
    Floats,
    Formula,
    Interval,
    Weighted,
    bound_all,
    effective_number,
    learn,
    pseudo_values,
    typical_size,
)
from llmtune.recipe.evaluate_section import ERROR
from llmtune.records import Difference

RankStatistic = Callable[[Floats], Weighted]
"""Builds a weighted statistic from the numbers of each row [N, K], for metrics without sums."""
Bounds = Callable[[Floats], tuple[Floats, Floats]]
"""Maps the rows of both models [M, K] to the worst and the best rows [P, K] (`metric.py`)."""

POWER = 0.8
"""Share of repetitions in which an existing difference is shown."""
MOST_STEPS = 20
ROUNDING = 1e-9
"""Distance of two scores, of about 1, that is only rounding."""
BOOTSTRAP, EXACT, INDEPENDENT = "Bayesian bootstrap", "Clopper-Pearson", "independent rows"
NARROWEST = 0.25
"""Least distance from the value to the interval's end at zero, as a share of the interval's width, by which `widen`
moves that end. The draws of a ratio may lie on one side of its value."""
METHOD = (
    f"95 %, from {RESAMPLES} draws of weights for the rows (or groups, by data.split_by, a shared picture, or a prompt "
    "that is sampled) and for a pseudo-row at either end of the metric's range (Gaffke's bound; shares of right rows: "
    "Clopper and Pearson's interval) with the mean size of groups, weighted by size (Kish's effective number of "
    "groups, also for Student's t); metrics without a range: pseudo-rows outside of the seen range, at least "
    f"Student's t, none for a difference below {FEWEST_UNBOUNDED} rows or a score below {FEWEST_UNSEEN}; other levels: "
    "ends moved as the quantiles of Student's t; p: the level whose interval ends at zero"
)


def difference(
    base_NK: Floats,
    tuned_NK: Floats,
    formula: Formula,
    *,
    right_wrong: bool,
    seed: int,
    resamples: int = RESAMPLES,
    bounds: Bounds | None = None,
    clusters: Sequence[int] = (),
) -> Difference:
    """Compare two models on the same rows.

    `base_NK` and `tuned_NK` contain each row's sums; those of right-or-wrong metrics (`right_wrong`) are [right, 1].
    The pseudo-rows of bounded metrics (`bounds`) are rows in which the models differ as much as the metric allows;
    those of other metrics are learned (`intervals.py`). `p_of_interval` has the p-value.
    Rows with equal numbers in `clusters` [N] belong together: they are summed, and these groups get the weights.
    With too few of them the interval is NaN and p is 1.
    """
    rows, bounds = len(base_NK), share_bounds if right_wrong else bounds
    if len(clusters):
        base_NK, tuned_NK = add_up(base_NK, clusters), add_up(tuned_NK, clusters)
    units, value = len(base_NK), float(formula(tuned_NK.sum(0)) - formula(base_NK.sum(0)))
    if units < 2 or not math.isfinite(value):
        return unknown(value, rows, clusters)
    if bounds is None:
        base_U, tuned_U = pseudo_values(base_NK, formula), pseudo_values(tuned_NK, formula)
        reach = float(np.ptp(np.concatenate([base_U, tuned_U])))
        unchanged = int((base_NK == tuned_NK).all(1).sum())
        options: dict[str, Any] = {"resamples": resamples, "effective": count_groups(clusters)[1]}
        interval = learn(tuned_U - base_U, seed, reach=reach, unchanged=unchanged, **options)
        other = learn(base_U, seed, **options)
    else:
        worst, best = bounds(np.concatenate([base_NK, tuned_NK]))
        with_ends = [np.concatenate([base_NK, best, worst]), np.concatenate([tuned_NK, worst, best])]
        base, tuned = (partial(weigh_sums, formula, sums_UK) for sums_UK in with_ends)
        interval, other = bound_all(partial(compare_weighted, base, tuned), units, len(worst), seed, resamples)
    return replace(conclude_interval(value, interval, rows, clusters), other=(other.low, other.high))


def compare_weighted(base: Weighted, tuned: Weighted, weights_RU: Floats) -> tuple[Floats, Floats]:
    """Return the difference [R] of two weighted metrics, and the first of them."""
    base_R = base(weights_RU)
    return tuned(weights_RU) - base_R, base_R


def weigh_sums(formula: Formula, sums_UK: Floats, weights_RU: Floats) -> Floats:
    """Return the metric [R] of weighted units."""
    return formula(weights_RU @ sums_UK)


def difference_weighted(
    base: Weighted, tuned: Weighted, rows: int, ends: int, *, seed: int, clusters: Sequence[int] = ()
) -> Difference:
    """Compare two models on the same N rows as `difference` does, by a metric that sums cannot express.

    Both statistics take the weights [R, N + 2 * ends] of the rows and of the pseudo-rows of either end.
    """
    unit_N = np.unique(clusters, return_inverse=True)[1] if len(clusters) else np.arange(rows)
    size_U = np.bincount(unit_N).astype(np.float64)
    units, size = len(size_U), typical_size(size_U)

    def values(weights_RU: Floats) -> tuple[Floats, Floats]:
        weights_RN = np.concatenate([weights_RU[:, :units][:, unit_N], weights_RU[:, units:] * size], axis=1)
        return compare_weighted(base, tuned, weights_RN)

    value = float(values(np.append(np.ones(units), np.zeros(2 * ends))[None])[0][0]) if rows else math.nan
    if not math.isfinite(value):
        return unknown(value, rows, clusters)
    interval, other = bound_all(values, units, ends, seed)
    return replace(conclude_interval(value, interval, rows, clusters), other=(other.low, other.high))


def conclude_interval(value: float, interval: Interval, rows: int, clusters: Sequence[int] = ()) -> Difference:
    """Return a difference, or a score, with its interval; without a test if it has none."""
    low, high = min(interval.low, value), max(interval.high, value)
    change = unknown(value, rows, clusters)
    if math.isnan(interval.low):
        return change
    return replace(change, low=low, high=high, p=p_of_interval(value, low, high, change.units), test=BOOTSTRAP)


def count_groups(clusters: Sequence[int]) -> tuple[int, float]:
    """Return the number of groups and their effective number, by rows; 0 without groups."""
    size_U = np.unique(clusters, return_counts=True)[1].astype(np.float64)
    return len(size_U), effective_number(size_U)


def add_up(sums_NK: Floats, clusters: Sequence[int]) -> Floats:
    """Return the sums [G, K] of rows that belong together."""
    groups, group_N = np.unique(clusters, return_inverse=True)
    sums_GK = np.zeros((len(groups), sums_NK.shape[1]))
    np.add.at(sums_GK, group_N, sums_NK)
    return sums_GK


def share_bounds(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(right, counted): nothing right, and everything."""
    counted = typical_size(sums_MK[:, 1])
    return np.array([[0.0, counted]]), np.array([[counted, counted]])


def interval(value: float, values_R: Floats, rows: int) -> Difference:
    """Return the interval of resampled differences of `rows` units, with widened tails, and a p-value."""
    defined = values_R[np.isfinite(values_R)]
    if rows < 2 or not np.isfinite(value) or len(defined) < (1 - UNDEFINED_SHARE) * len(values_R):
        return unknown(value, rows)
    import scipy.stats  # type: ignore[import-untyped]  # takes a third of a second, and training does not need it

    tail = float(scipy.stats.norm.cdf(np.sqrt(rows / (rows - 1)) * scipy.stats.t.ppf(ERROR / 2, rows - 1)))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return conclude_interval(value, Interval(float(low), float(high)), rows)


def unknown(value: float, rows: int, clusters: Sequence[int] = ()) -> Difference:
    """Return a difference without an interval."""
    return Difference(value, math.nan, math.nan, 1.0, rows, "", *count_groups(clusters))


def draw_counts(rows: int, seed: int, resamples: int) -> Iterator[Floats]:
    """Yield how often each row is drawn [R, N], some resamples at a time, which keeps memory flat in N."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CHUNK_CELLS // rows))
    for start in range(0, resamples, chunk):
        drawn = min(chunk, resamples - start)
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=drawn).astype(np.float64)


def row_deviation(change: Difference) -> float:
    """Return the standard deviation of a row's paired difference that gives a mean an interval of this width.

    For grouped rows it is larger than the actual one: the value at which ungrouped rows would give the same interval.
    """
    import scipy.stats

    if change.units < 2:
        return math.nan
    half = (change.high - change.low) / 2
    return half * math.sqrt(change.n) / float(scipy.stats.t.ppf(1 - ERROR / 2, change.units - 1))


def name_groups(rows: int, change: Difference) -> str:
    """Return ` in 12 groups` for this many rows in groups of the compared sizes; empty without groups."""
    share = rows / change.n if change.n else 0
    uneven = f", as informative as {math.floor(change.units * share):,} equal ones," if change.is_uneven else ""
    return f" in {math.ceil(change.groups * share):,} groups{uneven}" if change.groups else ""


def move_ends(low: float, high: float, value: float) -> tuple[float, float]:
    """Return by how much `widen` moves the low end down and the high end up, per unit of Student's t."""
    down, up, least = value - low, high - value, NARROWEST * (high - low)
    return max(down, least) if value > 0 else down, max(up, least) if value < 0 else up


def widen(change: Difference, alpha: float) -> Difference:
    """Return a difference whose interval has error `alpha` instead of 5 %.

    Both ends move as the quantiles of Student's t do: there are too few resamples for extreme quantiles. The new
    interval excludes zero if and only if p is below `alpha`.
    """
    import scipy.stats

    if alpha == ERROR:
        return change
    inner, outer = scipy.stats.t.ppf((1 - ERROR / 2, 1 - alpha / 2), max(1, change.units - 1))
    (down, up), more = move_ends(change.low, change.high, change.value), float(outer / inner) - 1
    return replace(change, low=change.low - more * down, high=change.high + more * up)


def allow_for_other(change: Difference, other: float, factor: float) -> Difference:
    """Return the difference with an interval for comparing it with (factor - 1) times the other model's score.

    That score is not exact either. Tuned minus factor * other is the difference minus (factor - 1) * other; both
    intervals are added, as if their errors came together.
    """
    down, up = sorted((1 - factor) * (end - other) for end in change.other) if factor != 1 else (0.0, 0.0)
    return replace(change, low=change.low + down, high=change.high + up)


def p_of_interval(value: float, low: float, high: float, units: float) -> float:
    """Return the p-value: the error at which the end of an interval that `widen` moved reaches zero.

    It has no smallest value, as a share of draws would: corrections for many metrics and looks need small ones.
    """
    import scipy.stats

    down, up = move_ends(low, high, value)
    end, move = (low, down) if value > 0 else (-high, up)
    if value == 0 or move <= 0:
        return float(value == 0)
    freedom = max(1, units - 1)
    steps = max(0.0, 1 + end / move) * float(scipy.stats.t.ppf(1 - ERROR / 2, freedom))
    return 2 * float(scipy.stats.t.sf(steps, freedom))


def subtract_intervals(first: Difference, second: Difference) -> Difference:
    """Return the difference of two scores on different rows, with an interval from both of theirs.

    Zou and Donner, "Construction of confidence limits about effect measures: A general approach", 2008.
    """
    value, units = first.value - second.value, min(first.units, second.units)
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    if units < 2 or not math.isfinite(low + high):
        return unknown(value, first.n)
    return Difference(value, low, high, p_of_interval(value, low, high, units), first.n, INDEPENDENT)


def smallest_difference(deviation: float, rows: int, alpha: float = ERROR) -> float:
    """Return the true difference that this many rows show with 80 % power, with an interval that excludes zero.

    The usual formula of a paired t test, (t of 97.5 % + t of 80 %) standard errors for an interval with 5 % error.
    """
    import scipy.stats

    if rows < 2:
        return math.inf
    return float(sum(scipy.stats.t.ppf((1 - alpha / 2, POWER), float(rows - 1)))) * deviation / math.sqrt(rows)


def rows_needed(deviation: float, distance: float, alpha: float = ERROR) -> int | None:
    """Return how many rows show, with 80 % power, on which side of a gate's limit the true difference is.

    `distance` is its distance from the limit; returns None if no number of rows is enough.
    """
    import scipy.stats

    if math.isnan(deviation) or not distance > ROUNDING * max(1.0, deviation):
        return None
    normal = float(sum(scipy.stats.norm.ppf((1 - alpha / 2, POWER))))
    rows = max(2, math.ceil((normal * deviation / distance) ** 2))
    for _ in range(MOST_STEPS):  # t needs two or three more rows
        if smallest_difference(deviation, rows, alpha) <= distance:
            break
        rows += 1
    return rows
