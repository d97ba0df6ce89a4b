"""One metric of one model on N rows: per-row sums with a formula over their totals, or a ranking of the rows.

Shapes: N rows, K sums per row, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.intervals import (
    FEWEST_UNSEEN,
    Floats,
    Formula,
    Weighted,
    bound,
    effective_number,
    exact_interval,
    learn,
    pseudo_values,
    typical_size,
)
from llmtune.evaluate.paired_statistics import (
    EXACT,
    Bounds,
    RankStatistic,
    add_up,
    conclude_interval,
    count_groups,
    difference,
    difference_weighted,
    share_bounds,
    unknown,
)
from llmtune.recipe.evaluate_section import ERROR
from llmtune.records import Difference

BY_VLLM = "; answers by vLLM"
"""The end of the signature of a metric of vLLM's answers."""


@dataclass(frozen=True)
class Measure:
    """One metric of one model on N rows, computed by `ranking` if set, else by `formula`."""

    metric: str
    sums_NK: Floats  # noqa: N815
    """Sums per row; with `ranking`, the numbers it reads. Measures with equal sums have equal values."""
    formula: Formula | None
    right_wrong: bool = False
    signature: str = ""
    ranking: RankStatistic | None = None
    at: tuple[int, ...] = ()
    """[N] indexes of these rows into the evaluated rows."""
    bounds: Bounds | None = None
    """A row at either end of the metric's range; None if it is unbounded."""
    clusters: tuple[int, ...] = ()
    """[N] equal for rows that belong together and are drawn and swapped together; empty if no rows do."""
    names: tuple[str, ...] = ()
    """[N] names of rows that depend on more than one evaluated row, such as a query with its candidates. Another run's
    rows are compared only under the same names. Empty if each is one evaluated row, named by `PerRowScores.rows`."""

    @property
    def value(self) -> float:
        """The metric over all rows; NaN without rows."""
        if len(self.sums_NK) == 0:
            return math.nan
        if self.formula is not None:
            return float(self.formula(self.sums_NK.sum(0)))
        return float(self.resampled(np.ones((1, len(self.sums_NK))))[0])

    @cached_property
    def resampled(self) -> Weighted:
        """The metric [R] with row n weighted by weights_RN[r, n]."""
        if self.ranking is not None:
            return self.ranking(self.sums_NK)
        assert self.formula is not None
        formula = self.formula
        return lambda counts_RN: formula(counts_RN @ self.sums_NK)

    def subset(self, rows: Collection[int]) -> Measure:
        """Return the metric on the rows whose index is in `rows`."""
        return self.take([n for n, row in enumerate(self.at) if row in rows])

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> Measure:
        """Return the metric on the rows with these numbers, in that order."""
        at, clusters = (tuple(part[n] for n in numbers) if part else () for part in (self.at, self.clusters))
        names = tuple(self.names[n] for n in numbers) if self.names else ()
        return replace(self, sums_NK=self.sums_NK[list(numbers)], at=at, clusters=clusters, names=names)

    def in_clusters(self, clusters: Sequence[int]) -> Measure:
        """Return it with the clusters of its rows; `clusters` is indexed by evaluated row, as `at` is."""
        return replace(self, clusters=tuple(clusters[row] for row in self.at)) if clusters else self


@dataclass(frozen=True)
class PairedMeasures:
    """The measures of base and tuned model on the same rows, by metric; the base may have none."""

    base: Mapping[str, Measure] = field(default_factory=dict)
    tuned: Mapping[str, Measure] = field(default_factory=dict)

    def subset(self, rows: Collection[int]) -> PairedMeasures:
        """Return the measures of some rows, by index; metrics without any of them are dropped."""
        parts = [
            {metric: one.subset(rows) for metric, one in one_model.items()} for one_model in (self.base, self.tuned)
        ]
        base, tuned = ({metric: one for metric, one in part.items() if len(one.sums_NK)} for part in parts)
        return PairedMeasures(base, tuned)

    def scores(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the scores of base and tuned model."""
        base, tuned = (
            {metric: one.value for metric, one in one_model.items()} for one_model in (self.base, self.tuned)
        )
        return base, tuned

    def differences(self, seed: int, fewest: int = 0) -> dict[str, Difference]:
        """Return tuned minus base by metric; no interval with fewer than `fewest` rows."""
        return {
            metric: paired_difference(self.base[metric], tuned, seed)
            if len(tuned.sums_NK) >= fewest
            else unknown(tuned.value - self.base[metric].value, len(tuned.sums_NK))
            for metric, tuned in self.tuned.items()
            if metric in self.base
        }


def paired_difference(base: Measure, tuned: Measure, seed: int) -> Difference:
    """Return tuned minus base with its 95 % interval; both need the same rows in the same order.

    Rows that belong together are drawn together, by the clusters of `tuned`, else those of `base`.
    """
    assert base.metric == tuned.metric
    assert len(base.sums_NK) == len(tuned.sums_NK)
    base, tuned = only_measured(base, tuned)
    rows = len(base.sums_NK)
    bounds, clusters = tuned.bounds, tuned.clusters or base.clusters
    if len(set(clusters)) == rows:
        clusters = ()
    if lacks_interval(bounds, clusters, rows):
        return unknown(tuned.value - base.value, rows, clusters)
    if tuned.formula is not None:
        sums, right_wrong = (base.sums_NK, tuned.sums_NK), tuned.right_wrong
        return difference(*sums, tuned.formula, right_wrong=right_wrong, seed=seed, bounds=bounds, clusters=clusters)
    assert bounds is not None, "rankings have bounds"
    worst, best = bounds(np.concatenate([base.sums_NK, tuned.sums_NK]))
    base_also, tuned_also = with_rows(base, best, worst, fixed=True), with_rows(tuned, worst, best)
    return difference_weighted(base_also, tuned_also, rows, len(worst), seed=seed, clusters=clusters)


def own_interval(measure: Measure, seed: int) -> Difference:
    """Return a model's score with its 95 % interval, by the construction of `intervals.py`."""
    (measure,) = only_measured(measure)
    rows, sums_NK = len(measure.sums_NK), measure.sums_NK
    bounds = share_bounds if measure.right_wrong else measure.bounds
    clusters = measure.clusters if len(set(measure.clusters)) < rows else ()
    is_share = bounds is share_bounds and np.isin(sums_NK, (0, 1)).all()
    if rows and is_share and sums_NK[:, 1].all() and not clusters:
        low, high = exact_interval(int(sums_NK[:, 0].sum()), rows, ERROR)
        return Difference(measure.value, low, high, 1.0, rows, EXACT)
    if not math.isfinite(measure.value) or lacks_interval(bounds, clusters, rows):
        return unknown(measure.value, rows, clusters)
    if measure.formula is None:
        assert bounds is not None, "rankings have bounds"
        worst, best = bounds(sums_NK)
        score = with_rows(measure, worst, best)
        return difference_weighted(nothing, score, rows, len(worst), seed=seed, clusters=clusters)
    sums_UK = add_up(sums_NK, clusters) if clusters else sums_NK
    if bounds is None:
        parts_U, effective = pseudo_values(sums_UK, measure.formula), count_groups(clusters)[1]
        interval = learn(parts_U, seed, fewest=FEWEST_UNSEEN, effective=effective)
    else:
        worst, best = bounds(sums_UK)
        score = with_rows(replace(measure, sums_NK=sums_UK), worst, best)
        interval = bound(score, len(sums_UK), len(worst), seed)
    return conclude_interval(measure.value, interval, rows, clusters)


def only_measured(*models: Measure) -> list[Measure]:
    """Return a ratio's measures without the rows that none of the models counts: they must not count as evidence."""
    if models[0].formula not in (ratio, ratio_of_counted):
        return [*models]
    counted = np.flatnonzero(np.any([one.sums_NK.any(1) for one in models], axis=0))
    return [one.take(counted) for one in models]


def lacks_interval(bounds: Bounds | None, clusters: Sequence[int], rows: int) -> bool:
    """Whether a metric has no interval, or a correlation says nothing: two points are always on a line."""
    return not rows or bounds is without_interval or (bounds is correlation_bounds and (len({*clusters}) or rows) < 3)


def nothing(weights_RN: Floats) -> Floats:
    """Return the scores [R] of a model that scores zero."""
    return np.zeros(len(weights_RN))


def with_rows(measure: Measure, first: Floats, second: Floats, *, fixed: bool = False) -> Weighted:
    """Return the metric [R] of weighted rows and two sets of pseudo-rows; with `fixed`, constant columns stay constant.

    A baseline without a model predicts the same number for every row. A pseudo-row with another number would
    give it a correlation that it cannot have.
    """
    constant_K = (np.ptp(measure.sums_NK, axis=0) == 0) & fixed
    ends = (np.where(constant_K, measure.sums_NK[:1], end_PK) for end_PK in (first, second))
    return replace(measure, sums_NK=np.concatenate([measure.sums_NK, *ends])).resampled


def ratio(sums: Floats) -> Floats:
    """[..., (numerator, denominator)] -> [...]; 0 / 0 is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def ratio_of_counted(sums: Floats) -> Floats:
    """Return the ratio of rows of which each model counts others, such as those that it decides."""
    return ratio(sums)


def rows_by_squares(sums: Floats) -> Floats:
    """Return the number of rows over the sum of their mean squared cosines; here the second sum is not a count."""
    return ratio(sums)


def measure_right(
    right: Sequence[bool], metric: str, signature: str = "texts equal once outer white space is stripped"
) -> Measure:
    """Build a right-or-wrong metric from one answer per row."""
    return replace(measure_shares(metric, [float(one) for one in right], signature), right_wrong=True)


def measure_shares(metric: str, values: Sequence[float], signature: str) -> Measure:
    """Build a metric that is the mean of one number per row, from 0 to 1."""
    return replace(measure_means(metric, values, signature), bounds=share_bounds)


def measure_means(metric: str, values: Sequence[float], signature: str) -> Measure:
    """Build a metric that is the mean of one number per row."""
    numbers = np.asarray(values, dtype=np.float64)
    return Measure(metric, columns(numbers, np.ones(len(numbers))), ratio, signature=signature)


def quotient(top: Floats, bottom: Floats) -> Floats:
    """Return `top / bottom`, and 0 where there is nothing to divide by."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, bottom.shape)), where=bottom > 0)


def columns(*parts: Floats) -> Floats:
    """Stack K columns [N] into [N, K]."""
    return np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=1)


def difference_of_ratios(sums: Floats) -> Floats:
    """[..., (numerator, denominator, numerator, denominator)] -> the first ratio minus the second [...]."""
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])


# Bounds: rows at either end of a metric's range.
#
# Ten rows with equal answers do not prove that all rows have equal answers. Intervals of bounded metrics therefore
# weigh pseudo-rows too, in which a model is as bad or as good as the metric allows, and which are as long as the row of
# a typical word (`intervals.py`). A mean over classes or tasks gets one for each of the rarest, because a single row
# may be all that shows them.
# Shapes: M rows of both models, or groups of rows added up; P pseudo-rows at either end.

MOST_CLASSES = 5
"""Classes with rows that get a pseudo-row: as many wrong ones all look right by chance in about 5 of 100 samples."""


def rarest(counts_C: Floats) -> NDArray[np.int64]:
    """Return the numbers of all classes without a row, and of the rarest ones with rows."""
    order_C = np.argsort(counts_C, kind="stable")
    return order_C[: int((counts_C == 0).sum()) + MOST_CLASSES]


def mean_share_bounds(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(right, counted) of several tasks: a question of each of the smallest tasks, where one counts most."""
    tasks, size = 2 * rarest(sums_MK[:, 1::2].sum(0)), typical_size(sums_MK[:, 1::2].sum(1))
    worst, best = np.zeros((2, len(tasks), sums_MK.shape[1]))
    each = np.arange(len(tasks))
    worst[each, tasks + 1] = best[each, tasks] = best[each, tasks + 1] = size
    return worst, best


def error_bounds(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(errors, reference length): as many errors as the reference is long, or as the worst row has; and none.

    An error rate has no upper bound: an answer may never end. The lower bound of the first row is an empty answer.
    """
    length = typical_size(sums_MK[:, 1])
    return np.array([[max(length, float(sums_MK[:, 0].max())), length]]), np.array([[0.0, length]])


def chrf_bounds(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(answer, reference, match) by n-gram order: a reference without a match, and matched by itself."""
    reference = sums_MK.mean(0)[1::3] * len(sums_MK) / (effective_number(sums_MK[:, 1]) or 1)
    worst, best = np.repeat(reference, 3), np.repeat(reference, 3)
    worst[2::3] = 0
    return worst[None], best[None]


def bleu_bounds(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(length, reference length, matches by order, n-grams by order): no match, and only matches."""
    length, orders = typical_size(sums_MK[:, 1]), (sums_MK.shape[1] - 2) // 2
    grams = np.maximum(length - np.arange(orders), 0)
    lengths = [length, length]
    return np.concatenate([lengths, 0 * grams, grams])[None], np.concatenate([lengths, grams, grams])[None]


def hit_bounds(sums_MK: Floats) -> tuple[Floats, Floats]:
    """(hits, predicted, right): nothing found, and everything."""
    right = typical_size(sums_MK[:, 2])
    return np.array([[0.0, right, right]]), np.array([[right, right, right]])


def class_bounds(sums_M3K: Floats) -> tuple[Floats, Floats]:
    """(hits, predicted, right) by class: a row of each of the rarest classes, predicted as the most frequent other."""
    right_MK = np.split(sums_M3K, 3, axis=1)[2]
    right_K, size = right_MK.sum(0), typical_size(right_MK.sum(1))
    rare_P = rarest(right_K)
    worst, best = np.zeros((2, len(rare_P), 3, len(right_K)))
    common = np.argsort(-right_K, kind="stable")
    for row, label in enumerate(rare_P):
        best[row, :, label] = worst[row, 2, label] = size
        worst[row, 1, common[int(len(common) > 1 and common[0] == label)]] = size
    return worst.reshape(len(rare_P), -1), best.reshape(len(rare_P), -1)


def rank_bounds(seen_MK: Floats) -> tuple[Floats, Floats]:
    """(scores, right) by class: a row of each of the rarest classes with its lowest score, or its highest."""
    scores, right = np.split(seen_MK, 2, axis=1)
    true_PC = np.eye(right.shape[1])[rarest(right.sum(0))]
    low, high = scores.min(0), scores.max(0)
    worst, best = np.where(true_PC, low, high), np.where(true_PC, high, low)
    return np.concatenate([worst, true_PC], 1), np.concatenate([best, true_PC], 1)


def correlation_bounds(seen_M2: Floats) -> tuple[Floats, Floats]:
    """(predicted, reference): the highest reference with the lowest prediction, and with the highest."""
    (low, _), (high, top) = seen_M2.min(0), seen_M2.max(0)
    return np.array([[low, top]]), np.array([[high, top]])


def brier_bounds(sums_M2: Floats) -> tuple[Floats, Floats]:
    """(squared errors, choices): certain of a wrong label, and of the right one."""
    choices = typical_size(sums_M2[:, 1])
    return np.array([[2 * choices, choices]]), np.array([[0.0, choices]])


def without_interval(sums_MK: Floats) -> tuple[Floats, Floats]:
    """Mark a metric that noise alone moves to one side, by more for some models than for others: it has no interval."""
    raise AssertionError("a metric without an interval has no bounds")


BOUNDS: Mapping[str, Bounds] = {
    "share": share_bounds,
    "counted": share_bounds,
    "mean of shares": mean_share_bounds,
    "errors": error_bounds,
    "chrf": chrf_bounds,
    "bleu": bleu_bounds,
    "found": hit_bounds,
    "classes": class_bounds,
    "ranks": rank_bounds,
    "correlation": correlation_bounds,
    "brier": brier_bounds,
    "reliability": without_interval,
}
"""By their names on disk."""
