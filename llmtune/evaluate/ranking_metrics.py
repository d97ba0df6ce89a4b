"""Metrics of ranked passages, one number per query: nDCG, reciprocal rank and recall at a cutoff, average precision.

They equal those of ir-measures (trec_eval): nDCG with linear gains, a passage is relevant if its relevance is above
one half. Equal scores have no order, so each metric is its mean over all orders of them, as in McSherry and Najork,
"Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", 2008. The order of
rows in a file therefore changes no score, and a model that scores all passages equally ranks like chance.

Shapes: P ranked passages of a query, best first; G groups of passages with equal scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmtune.evaluate.metric import Measure, measure_shares
from llmtune.evaluate.paired_statistics import Floats

RELEVANT = 0.5
"""A passage is relevant above this relevance."""
SIGNATURE = "mean over queries with a relevant passage; equal scores count as the mean of their orders"


@dataclass(frozen=True)
class RankedQuery:
    """The scored passages of one query, in any order."""

    scores: Sequence[float] | Floats
    relevances: Sequence[float] | Floats
    """Of the same passages; a negative relevance counts as 0."""
    unranked: Sequence[float] = ()
    """Relevances of passages without a score, such as those below the top of a large corpus."""

    @property
    def has_relevant(self) -> bool:
        """Return whether any passage is relevant; a query without one has no metric."""
        return any(relevance > RELEVANT for relevance in (*self.relevances, *self.unranked))


def measure_ranking(metric: str, queries: Sequence[RankedQuery], at: Sequence[int] = ()) -> Measure:
    """Build `ndcg@K`, `mrr@K`, `recall@K` or `map` from N queries; the measure has a row per query, not per passage.

    Queries without a relevant passage are left out. `at` [N] has the index of the evaluated row that stands for each
    query; by default the query's own number.
    """
    name, _, cutoff = metric.partition("@")
    kept = [i for i, query in enumerate(queries) if query.has_relevant]
    values = [value_of(name, queries[i], int(cutoff or 0)) for i in kept]
    measured = measure_shares(metric, values, SIGNATURE)
    return replace(measured, at=tuple(at[i] if at else i for i in kept))


def value_of(name: str, query: RankedQuery, cutoff: int) -> float:
    """Return `ndcg`, `mrr`, `recall` at a cutoff, or `map`, of a query with a relevant passage."""
    scores, gains = np.asarray(query.scores, dtype=np.float64), np.maximum(np.asarray(query.relevances, np.float64), 0)
    order_P = np.argsort(-scores, kind="stable")
    starts_G = np.flatnonzero(np.diff(scores[order_P], prepend=np.nan) != 0)
    sizes_G = np.diff(starts_G, append=len(scores))
    every = np.maximum(np.concatenate([gains, np.asarray(query.unranked, dtype=np.float64)]), 0)
    relevant = int((every > RELEVANT).sum())

    def by_position(values_P: Floats) -> Floats:
        """Give each position the mean value of the passages that may be there."""
        mean_G = np.asarray(np.add.reduceat(values_P[order_P], starts_G) / sizes_G, dtype=np.float64)
        return np.repeat(mean_G, sizes_G)

    if not len(scores):
        return 0.0
    if name == "ndcg":
        return discounted(by_position(gains)[:cutoff]) / discounted(np.sort(every)[::-1][:cutoff])
    if name == "recall":
        return float(by_position((gains > RELEVANT).astype(np.float64))[:cutoff].sum()) / relevant
    hits_G = np.add.reduceat((gains > RELEVANT)[order_P].astype(np.int64), starts_G)
    groups = [(int(s), int(n), int(r)) for s, n, r in zip(starts_G, sizes_G, hits_G, strict=True) if r]
    if name == "mrr":
        return sum(share / rank for rank, share in first_hits(*groups[0]) if rank <= cutoff) if groups else 0.0
    assert name == "map"
    return sum(precisions(groups)) / relevant


def discounted(gains_P: Floats) -> float:
    """Return the cumulative gain, discounted by the logarithm of the rank."""
    return float((gains_P / np.log2(np.arange(len(gains_P)) + 2)).sum())


def first_hits(start: int, size: int, hits: int) -> Iterator[tuple[int, float]]:
    """Yield each rank in a group of equal scores with the probability that the first relevant passage is there."""
    missed = 1.0
    for i in range(size - hits + 1):
        share = hits / (size - i)
        yield start + i + 1, missed * share
        missed *= 1 - share


def precisions(groups: Sequence[tuple[int, int, int]]) -> Iterator[float]:
    """Yield the expected precision at each rank, times the probability of a relevant passage there."""
    before = 0
    for start, size, hits in groups:
        others = (hits - 1) / (size - 1) if size > 1 else 0.0
        yield from (hits / size * (before + 1 + i * others) / (start + i + 1) for i in range(size))
        before += hits
