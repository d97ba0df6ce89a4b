"""One metric of one model on N rows: sums that add up row by row and a formula over them, or a ranking of the rows.

Shapes: N rows, K sums a row, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from llmtune.evaluate.paired_statistics import (
    BOOTSTRAP,
    Ends,
    Floats,
    Formula,
    RankStatistic,
    Weighted,
    difference,
    difference_weighted,
    pair_ends,
    share_ends,
    unknown,
)
from llmtune.records import Difference


@dataclass(frozen=True)
class Measure:
    """One metric of one model on N rows, by `formula`, or by `ranking` where that is there."""

    metric: str
    sums_NK: Floats  # noqa: N815
    """Sums by row; with `ranking`, the numbers of each row that it reads: where they are equal, the values are."""
    formula: Formula | None
    right_wrong: bool = False
    signature: str = ""
    ranking: RankStatistic | None = None
    at: tuple[int, ...] = ()
    """[N] indexes of these rows into the evaluated rows."""
    ends: Ends | None = None
    """A row at either end of the metric's range; None where it has no bounds."""
    clusters: tuple[int, ...] = ()
    """[N] equal for rows that belong together, which are drawn and swapped together; empty where each is alone."""

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
        """The metric [R] of rows that are drawn counts_RN[r, n] times."""
        if self.ranking is not None:
            return self.ranking(self.sums_NK)
        assert self.formula is not None
        formula = self.formula
        return lambda counts_RN: formula(counts_RN @ self.sums_NK)

    def subset(self, rows: Collection[int]) -> Measure:
        """Return the metric of those rows alone whose index is in `rows`."""
        return self.take([n for n, row in enumerate(self.at) if row in rows])

    def take(self, numbers: Sequence[int]) -> Measure:
        """Return the metric of its rows of these numbers, in that order."""
        at, clusters = (tuple(part[n] for n in numbers) if part else () for part in (self.at, self.clusters))
        return replace(self, sums_NK=self.sums_NK[list(numbers)], at=at, clusters=clusters)

    def in_clusters(self, clusters: Sequence[int]) -> Measure:
        """Return it with what belongs together, by index into the evaluated rows as in `at`."""
        return replace(self, clusters=tuple(clusters[row] for row in self.at)) if clusters else self


@dataclass(frozen=True)
class PairedMeasures:
    """The measures of base and tuned model on the same rows, by metric; the base may have none."""

    base: Mapping[str, Measure] = field(default_factory=dict)
    tuned: Mapping[str, Measure] = field(default_factory=dict)

    def subset(self, rows: Collection[int]) -> PairedMeasures:
        """Return the measures of some rows, by index; a metric without any of them is left out."""
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
        """Return tuned minus base by metric; without an interval where there are fewer than `fewest` rows."""
        return {
            metric: paired_difference(self.base[metric], tuned, seed)
            if len(tuned.sums_NK) >= fewest
            else unknown(tuned.value - self.base[metric].value, len(tuned.sums_NK))
            for metric, tuned in self.tuned.items()
            if metric in self.base
        }


def paired_difference(base: Measure, tuned: Measure, seed: int) -> Difference:
    """Return tuned minus base with its 95 % interval; both must hold the same rows in the same order.

    What belongs together is drawn together, as `tuned` has it, or `base` where that alone knows.
    """
    assert base.metric == tuned.metric
    rows = len(base.sums_NK)
    assert rows == len(tuned.sums_NK)
    ends, clusters = tuned.ends, tuned.clusters or base.clusters
    if len(set(clusters)) == rows:
        clusters = ()
    if tuned.formula is not None:
        sums, right_wrong = (base.sums_NK, tuned.sums_NK), tuned.right_wrong
        return difference(*sums, tuned.formula, right_wrong=right_wrong, seed=seed, ends=ends, clusters=clusters)
    if ends is None and rows > 1 and np.array_equal(base.sums_NK, tuned.sums_NK):
        return Difference(0.0, 0.0, 0.0, 1.0, rows, BOOTSTRAP)
    with_ends = None
    if ends is not None and rows:
        ends_22K = pair_ends(ends(np.concatenate([base.sums_NK, tuned.sums_NK])))
        base_also, tuned_also = (
            replace(one, sums_NK=with_rows(one.sums_NK, ends_22K[:, which])).resampled
            for which, one in enumerate((base, tuned))
        )
        with_ends = base_also, tuned_also
    return difference_weighted(base.resampled, tuned.resampled, rows, seed=seed, with_ends=with_ends, clusters=clusters)


def with_rows(sums_NK: Floats, ends_2K: Floats) -> Floats:
    """Return the rows of a model with two pseudo-rows, in which constants stay.

    A baseline without a model predicts the same number for every row. A pseudo-row with another number would be its
    only one, and give it a correlation that it cannot have.
    """
    constant_K = np.ptp(sums_NK, axis=0) == 0
    return np.concatenate([sums_NK, np.where(constant_K, sums_NK[:1], ends_2K)])


def ratio(sums: Floats) -> Floats:
    """[..., (numerator, denominator)] -> [...]; 0 / 0 is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def measure_right(
    right: Sequence[bool], metric: str, signature: str = "texts equal once outer white space is stripped"
) -> Measure:
    """Build a right-or-wrong metric from one answer a row."""
    return replace(measure_shares(metric, [float(one) for one in right], signature), right_wrong=True)


def measure_shares(metric: str, values: Sequence[float], signature: str) -> Measure:
    """Build a metric that is the mean of one number a row, from 0 to 1."""
    return replace(measure_means(metric, values, signature), ends=share_ends)


def measure_means(metric: str, values: Sequence[float], signature: str) -> Measure:
    """Build a metric that is the mean of one number a row."""
    numbers = np.asarray(values, dtype=np.float64)
    return Measure(metric, columns(numbers, np.ones(len(numbers))), ratio, signature=signature)


def columns(*parts: Floats) -> Floats:
    """Stack K columns [N] into [N, K]."""
    return np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=1)


def difference_of_ratios(sums: Floats) -> Floats:
    """[..., (numerator, denominator, numerator, denominator)] -> the first ratio less the second [...]."""
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])
