"""One metric of one model on N rows: sums that add up row by row and a formula over them, or a function of rows drawn.

Shapes: N rows, M of them, K sums a row, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmtune.evaluate.paired_statistics import (
    BOOTSTRAP,
    CHUNK_CELLS,
    Floats,
    Formula,
    Weighted,
    difference,
    difference_weighted,
)
from llmtune.records import Difference


@dataclass(frozen=True)
class Measure:
    """One metric of one model on N rows, by `formula`, or by `weighted` where that is there."""

    metric: str
    sums_NK: Floats  # noqa: N815
    """Sums by row; with `weighted`, the numbers of each row that it reads: where they are equal, the values are."""
    formula: Formula | None
    right_wrong: bool = False
    signature: str = ""
    weighted: Weighted | None = None
    at: tuple[int, ...] = ()
    """[N] indexes of these rows into those of the plan."""

    @property
    def value(self) -> float:
        """The metric over all rows; NaN without rows."""
        if len(self.sums_NK) == 0:
            return math.nan
        if self.weighted is not None:
            return float(self.drawn(np.ones((1, len(self.sums_NK))))[0])
        assert self.formula is not None
        return float(self.formula(self.sums_NK.sum(0)))

    def drawn(self, counts_RN: Floats) -> Floats:
        """Return the metric [R] of rows that are drawn counts_RN[r, n] times."""
        if self.weighted is not None:
            return self.weighted(counts_RN)
        assert self.formula is not None
        return self.formula(counts_RN @ self.sums_NK)

    def of(self, chosen: Collection[int]) -> Measure:
        """Return the metric of those rows alone whose index into the plan is `chosen`."""
        kept = [n for n, row in enumerate(self.at) if row in chosen]
        weighted, total = self.weighted, len(self.sums_NK)

        def spread(counts_RM: Floats) -> Floats:
            assert weighted is not None
            values = []
            for part_RM in np.array_split(counts_RM, -(-counts_RM.shape[0] * total // CHUNK_CELLS) or 1):
                counts_RN = np.zeros((len(part_RM), total))
                counts_RN[:, kept] = part_RM
                values.append(weighted(counts_RN))
            return np.concatenate(values)

        return replace(
            self,
            sums_NK=self.sums_NK[kept],
            weighted=None if weighted is None else spread,
            at=tuple(self.at[n] for n in kept),
        )


def compare(base: Measure, tuned: Measure, seed: int) -> Difference:
    """Return tuned minus base with its 95 % interval; both must hold the same rows in the same order."""
    assert base.metric == tuned.metric
    rows = len(base.sums_NK)
    assert rows == len(tuned.sums_NK)
    if tuned.weighted is None:
        assert tuned.formula is not None
        return difference(base.sums_NK, tuned.sums_NK, tuned.formula, right_wrong=tuned.right_wrong, seed=seed)
    if rows > 1 and np.array_equal(base.sums_NK, tuned.sums_NK):
        return Difference(0.0, 0.0, 0.0, 1.0, rows, BOOTSTRAP)
    return difference_weighted(base.drawn, tuned.drawn, rows, seed=seed)


def ratio(sums: Floats) -> Floats:
    """[..., (numerator, denominator)] -> [...]; 0 / 0 is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def measure_right(
    right: Sequence[bool], metric: str, signature: str = "texts equal once outer white space is stripped"
) -> Measure:
    """Build a right-or-wrong metric from one answer a row."""
    values = np.asarray(right, dtype=np.float64)
    return Measure(metric, columns(values, np.ones(len(values))), ratio, right_wrong=True, signature=signature)


def measure_means(metric: str, values: Sequence[float], signature: str) -> Measure:
    """Build a metric that is the mean of one number a row."""
    return Measure(
        metric, columns(np.asarray(values, dtype=np.float64), np.ones(len(values))), ratio, signature=signature
    )


def columns(*parts: Floats) -> Floats:
    """Stack K columns [N] into [N, K]."""
    return np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=1)
