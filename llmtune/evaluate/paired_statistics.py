"""Paired statistics on the rows that both models answered: an interval and a p-value for tuned minus base.

Nearly every metric is a formula over per-row sums (nats and tokens, right answers and answers, n-gram counts). One
resampling therefore serves means, ratios and corpus scores. Rank metrics have no such sums; they depend on how
often each row was drawn. Shapes: R resamples, N rows, K sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmtune.recipe.evaluate_section import ERROR
from llmtune.score_records import Difference

Floats = NDArray[np.float64]
Formula = Callable[[Floats], Floats]
"""Maps summed statistics [..., K] to the metric's value [...]."""
Weighted = Callable[[Floats], Floats]
"""Maps how often each row is drawn [R, N] to the metric's values [R]."""
RankStatistic = Callable[[Floats], Weighted]
"""Builds a weighted statistic from the numbers of each row [N, K], for metrics without sums."""
Bounds = Callable[[Floats], tuple[Floats, Floats]]
"""Maps the rows of both models [M, K] to a worst and a best row [K] (`metric.py`)."""

RESAMPLES = 5000
CHUNK_CELLS = 200_000
"""Counts held at a time: small enough for a CPU cache, large enough for its matrix product."""
UNDEFINED_SHARE = 0.01
"""Share of resamples that may lack a value (no row of a rare class was drawn) and are skipped."""
ALL_SWAPS = 12
"""Up to this many rows, every way of swapping the two models' answers is tried."""
POWER = 0.8
"""Share of repetitions in which an existing difference is shown."""
MOST_STEPS = 20
BEYOND = 1.0
"""How far an end of an interval moves, in rows: lost rows are whole numbers, quantiles fall between them."""
EQUAL = 1e-9
"""Share of a difference below which rows differ only by rounding."""
SWAPS, BOOTSTRAP, MCNEMAR = "paired permutation", "paired bootstrap", "McNemar mid-p"
EXACT = "Clopper-Pearson"
METHOD = (
    f"95 %, paired bootstrap over rows (with data.split_by over its groups), {RESAMPLES} resamples, expanded "
    "percentiles; resamples without a value are skipped if they are at most 1 in 100; bounded metrics with one "
    f"pseudo-row at either end of their range; p by {RESAMPLES} paired permutations, at least that of Johnson's t for "
    "skewed differences (ranks: by the bootstrap); right-or-wrong metrics with p by McNemar's test, mid-p (groups: by "
    "permutations)"
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

    `base_NK` and `tuned_NK` contain each row's sums. The interval is the bootstrap percentile interval with the tails
    widened for small samples as in Hesterberg, "What Teachers Should Know About the Bootstrap", 2015.
    Bounded metrics (`bounds`) get two pseudo-rows in the resampling, in which the models differ as much as the metric
    allows, either way. Right-or-wrong metrics (`right_wrong`, sums [right, 1]) get them after Bonett and Price,
    "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data", 2012: without
    them the interval of ten rows that all got better would be a single point. The ends of other bounded metrics also
    move out by one row. A model that is worse by exactly the margin of a gate then passes in at most 4 of 100 runs,
    whatever the share of equal answers. The p of right-or-wrong metrics is McNemar's; for all others it comes from
    swapping the answers of the two models, row by row, and is never below that of `skewed_p`.
    Rows with equal numbers in `clusters` [N] belong together: they are summed, and these groups drawn and swapped.
    With fewer than two of them, or more than one in a hundred resamples without a finite value, the interval is NaN and
    p is 1.
    """
    if len(clusters):
        sums, bounds = (add_up(base_NK, clusters), add_up(tuned_NK, clusters)), share_bounds if right_wrong else bounds
        grouped = difference(*sums, formula, right_wrong=False, seed=seed, resamples=resamples, bounds=bounds)
        return replace(grouped, n=len(base_NK), groups=grouped.n)
    rows, bounds = len(base_NK), share_bounds if right_wrong else bounds
    value = float(formula(tuned_NK.sum(0)) - formula(base_NK.sum(0)))
    if rows < 2:
        return unknown(value, rows)
    paired_N2K = np.stack([base_NK, tuned_NK], axis=1)
    if bounds is None and np.array_equal(base_NK, tuned_NK):
        return Difference(0.0, 0.0, 0.0, 1.0, rows, SWAPS)
    bounds_22K = pair_bounds(bounds(np.concatenate([base_NK, tuned_NK]))) if bounds else paired_N2K[:0]
    change = interval(value, resample(np.concatenate([paired_N2K, bounds_22K]), formula, seed, resamples), rows)
    if not np.isfinite(change.low):
        return change
    if right_wrong:
        return replace(change, p=mcnemar(*discordant(base_NK, tuned_NK)), test=MCNEMAR)
    if bounds is not None:
        with_one, alone = (
            formula(sums[:, 1]) - formula(sums[:, 0]) for sums in (paired_N2K.sum(0) + bounds_22K, bounds_22K)
        )
        change = move_apart(change, with_one, widest=float(np.abs(alone).max()))
    swapped = permutation_p(base_NK, tuned_NK, formula, seed, resamples)
    return replace(change, p=max(swapped, skewed_p(base_NK, tuned_NK, formula)), test=SWAPS)


def difference_weighted(
    base: Weighted,
    tuned: Weighted,
    rows: int,
    *,
    seed: int,
    bounded: tuple[Weighted, Weighted] | None = None,
    clusters: Sequence[int] = (),
) -> Difference:
    """Compare two models on the same N rows as `difference` does, by a metric that sums cannot express.

    `bounded` is the pair of statistics of a bounded metric on two more rows, the pairs of `pair_bounds`.
    """
    once_1N = np.ones((1, rows))
    value = float(tuned(once_1N)[0] - base(once_1N)[0]) if rows else float("nan")
    unit_N = np.unique(clusters, return_inverse=True)[1] if len(clusters) else np.arange(rows)
    units = len(np.unique(unit_N))
    groups = units if len(clusters) else 0
    if units < 2:
        return replace(unknown(value, rows), groups=groups)
    base, tuned = bounded or (base, tuned)
    size = rows / units

    def values(counts_RU: Floats) -> Floats:
        drawn_RN = counts_RU[:, unit_N]
        if bounded is not None:  # a pseudo-row counts as a group of average size
            drawn_RN = np.concatenate([drawn_RN, counts_RU[:, units:] * size], axis=1)
        return tuned(drawn_RN) - base(drawn_RN)

    drawn = draw_counts(units + 2 * (bounded is not None), seed, RESAMPLES)
    change = interval(value, np.concatenate([values(counts_RU) for counts_RU in drawn]), units)
    if bounded is not None and np.isfinite(change.low):
        change = move_apart(change, values(np.concatenate([np.ones((2, units)), np.eye(2)], axis=1)))
    return replace(change, n=rows, groups=groups)


def add_up(sums_NK: Floats, clusters: Sequence[int]) -> Floats:
    """Return the sums [G, K] of rows that belong together."""
    groups, group_N = np.unique(clusters, return_inverse=True)
    sums_GK = np.zeros((len(groups), sums_NK.shape[1]))
    np.add.at(sums_GK, group_N, sums_NK)
    return sums_GK


def share_bounds(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(right, counted): nothing right, and everything, in a row of average length."""
    counted = float(sums_MK[:, 1].mean())
    return np.array([0.0, counted]), np.array([counted, counted])


def pair_bounds(bounds: tuple[Floats, Floats]) -> Floats:
    """Return two pseudo-rows [2, (base, tuned), K]: the tuned model at the better end, then at the worse one."""
    worst, best = bounds
    return np.array([[worst, best], [best, worst]])


def move_apart(change: Difference, values_2: Floats, widest: float = math.inf) -> Difference:
    """Move the ends of an interval outwards by the effect of one more row.

    `values_2` are the differences with one pseudo-row of either kind, `widest` the largest possible difference. This
    corrects a discrete count for continuity: the bootstrap's quantile of a few lost rows is about one row too small.
    """
    changes = np.nan_to_num(values_2 - change.value)
    down, up = float(min(changes.min(), 0)), float(max(changes.max(), 0))
    low, high = change.low + BEYOND * down, change.high + BEYOND * up
    return replace(change, low=max(low, min(-widest, change.low)), high=min(high, max(widest, change.high)))


def interval(value: float, values_R: Floats, rows: int) -> Difference:
    """Return the interval of resampled differences, with widened tails, and a p-value."""
    defined = values_R[np.isfinite(values_R)]
    if not np.isfinite(value) or len(defined) < (1 - UNDEFINED_SHARE) * len(values_R):
        return unknown(value, rows)
    import scipy.stats  # type: ignore[import-untyped]  # takes a third of a second, and training does not need it

    tail = float(scipy.stats.norm.cdf(np.sqrt(rows / (rows - 1)) * scipy.stats.t.ppf(ERROR / 2, rows - 1)))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Difference(value, min(float(low), value), max(float(high), value), two_sided_p(defined), rows, BOOTSTRAP)


def unknown(value: float, rows: int) -> Difference:
    """Return a difference without an interval."""
    return Difference(value, float("nan"), float("nan"), 1.0, rows)


def discordant(base_NK: Floats, tuned_NK: Floats) -> tuple[int, int]:
    """Count the rows that the base model scored higher on, and those that the tuned one did (right, half, wrong)."""
    base_N, tuned_N = base_NK[:, 0], tuned_NK[:, 0]
    return int(np.sum(base_N > tuned_N)), int(np.sum(tuned_N > base_N))


def resample(paired_N2K: Floats, formula: Formula, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Draw rows with replacement and return tuned minus base for each of R draws; memory stays flat in N."""
    rows, _, sums = paired_N2K.shape
    flat = paired_N2K.reshape(rows, 2 * sums)
    values = []
    for counts_RN in draw_counts(rows, seed, resamples):
        totals = (counts_RN @ flat).reshape(len(counts_RN), 2, sums)
        values.append(formula(totals[:, 1]) - formula(totals[:, 0]))
    return np.concatenate(values)


def draw_counts(rows: int, seed: int, resamples: int) -> Iterator[Floats]:
    """Yield how often each row is drawn [R, N], some resamples at a time, which keeps memory flat in N."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CHUNK_CELLS // rows))
    for start in range(0, resamples, chunk):
        drawn = min(chunk, resamples - start)
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=drawn).astype(np.float64)


def two_sided_p(values_R: Floats) -> float:
    """Twice the share of resamples on the less likely side of zero; never below 2 / (R + 1)."""
    below = (int(np.sum(values_R <= 0)) + 1) / (len(values_R) + 1)
    above = (int(np.sum(values_R >= 0)) + 1) / (len(values_R) + 1)
    return min(1.0, 2 * min(below, above))


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
    """Return ` in 12 groups` for this many rows in groups of the compared size; empty without groups."""
    return f" in {math.ceil(rows * change.groups / change.n):,} groups" if change.groups else ""


def widen(change: Difference, alpha: float) -> Difference:
    """Return a difference whose interval has error `alpha` instead of 5 %.

    Both ends move out as the quantiles of Student's t do: there are too few resamples for such extreme quantiles.
    """
    import scipy.stats

    if alpha == ERROR or change.units < 2:
        return change
    inner, outer = scipy.stats.t.ppf((1 - ERROR / 2, 1 - alpha / 2), change.units - 1)
    low, high = (change.value + (end - change.value) * float(outer / inner) for end in (change.low, change.high))
    return replace(change, low=low, high=high)


def smallest_difference(deviation: float, rows: int, alpha: float = ERROR) -> float:
    """Return the true difference that this many rows show with 80 % power, with an interval that excludes zero.

    The usual formula of a paired t test, (t of 97.5 % + t of 80 %) standard errors for an interval with 5 % error.
    """
    import scipy.stats

    if rows < 2:
        return math.inf
    return float(sum(scipy.stats.t.ppf((1 - alpha / 2, POWER), rows - 1))) * deviation / math.sqrt(rows)


def rows_needed(deviation: float, distance: float, alpha: float = ERROR) -> int | None:
    """Return how many rows show, with 80 % power, on which side of a gate's limit the true difference is.

    `distance` is its distance from the limit; returns None if no number of rows is enough.
    """
    import scipy.stats

    if not distance > 0 or math.isnan(deviation):
        return None
    normal = float(sum(scipy.stats.norm.ppf((1 - alpha / 2, POWER))))
    rows = max(2, math.ceil((normal * deviation / distance) ** 2))
    for _ in range(MOST_STEPS):  # t needs two or three more rows
        if smallest_difference(deviation, rows, alpha) <= distance:
            break
        rows += 1
    return rows


def exact_interval(hits: int, rows: int, alpha: float) -> tuple[float, float]:
    """Return the interval of a share: Clopper and Pearson, "The Use of Confidence or Fiducial Limits", 1934."""
    import scipy.stats

    low = float(scipy.stats.beta.ppf(alpha / 2, hits, rows - hits + 1)) if hits else 0.0
    high = float(scipy.stats.beta.ppf(1 - alpha / 2, hits + 1, rows - hits)) if hits < rows else 1.0
    return low, high


def permutation_p(base_NK: Floats, tuned_NK: Floats, formula: Formula, seed: int, resamples: int = RESAMPLES) -> float:
    """Return the share of answer swaps with a difference as large as the observed one, counting the observed one.

    If the models do not differ, each row's two answers are exchangeable. Noreen,
    "Computer-Intensive Methods for Testing Hypotheses", 1989. A bootstrap's p is far too small below thirty rows.
    """
    rows = len(base_NK)
    change_NK = tuned_NK - base_NK
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CHUNK_CELLS // rows))
    if rows <= ALL_SWAPS:
        swaps = iter([np.arange(2**rows)[:, None] >> np.arange(rows) & 1])
    else:
        swaps = (generator.integers(0, 2, (min(chunk, resamples - i), rows)) for i in range(0, resamples, chunk))
    moved = (swap_RN.astype(np.float64) @ change_NK for swap_RN in swaps)
    values_R = np.concatenate([formula(tuned_NK.sum(0) - RK) - formula(base_NK.sum(0) + RK) for RK in moved])
    seen = abs(float(formula(tuned_NK.sum(0)) - formula(base_NK.sum(0))))
    as_large = int(np.sum(~(np.abs(values_R) < seen * (1 - 1e-9))))
    sampled = rows > ALL_SWAPS
    return (as_large + sampled) / (len(values_R) + sampled)


def skewed_p(base_NK: Floats, tuned_NK: Floats, formula: Formula) -> float:
    """Return the p-value of a t test corrected for skewed differences; 0 if the differences do not vary.

    Swaps assume that differences are as often above zero as below. For skewed differences with a mean of zero, such as
    many small gains and a few large losses, their p is too small. Each row contributes its jackknife value. Johnson,
    "Modified t Tests and Confidence Intervals for Asymmetrical Populations", 1978.
    """
    import scipy.stats

    rows = len(base_NK)
    value = formula(tuned_NK.sum(0)) - formula(base_NK.sum(0))
    without_N = formula(tuned_NK.sum(0) - tuned_NK) - formula(base_NK.sum(0) - base_NK)
    part_N = (rows - 1) * (value - without_N)
    deviation = float(part_N.std(ddof=1))
    if not deviation > EQUAL * abs(value):
        return 0.0
    part_N = (part_N - part_N.mean()) / deviation
    t, skewness = float(value) * math.sqrt(rows) / deviation, float((part_N**3).mean())
    t += skewness * (1 + 2 * t**2) / (6 * math.sqrt(rows))
    return 2 * float(scipy.stats.t.sf(abs(t), rows - 1))


def mcnemar(only_base: int, only_tuned: int) -> float:
    """Return the mid-p-value of McNemar's test on the rows that only one model got right.

    The exact test is far below its level with few such rows: Fagerland, Lydersen and Laake, "The McNemar test for
    binary matched-pairs data: mid-p and asymptotic are better than exact conditional", 2013.
    """
    discordant = only_base + only_tuned
    if discordant == 0:
        return 1.0
    import scipy.stats

    fewer = min(only_base, only_tuned)
    tail = scipy.stats.binom.cdf(fewer, discordant, 0.5) - scipy.stats.binom.pmf(fewer, discordant, 0.5) / 2
    return min(1.0, 2 * float(tail))
