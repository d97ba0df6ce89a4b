"""Search with vectors, and metrics of ranked passages: nDCG, reciprocal rank and recall at a cutoff, mean precision.

A metric has a number per query. They equal the metrics of ir-measures (trec_eval): nDCG with linear gains; a passage is
relevant if its relevance is above one half. Equal scores have no order, so each metric is its mean over all orders of
them, as in McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of
Tied Scores", 2008. The order of rows in a file therefore changes no score, and a model that scores all passages equally
ranks like chance.

Shapes: P passages, ranked ones best first; G groups of passages with equal scores; N rows, Q queries, D numbers of a
vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, columns, measure_means, measure_shares, rows_by_squares
from llmtune.evaluate.per_row_scores import name_rows
from llmtune.store.atomic_files import hash_value

RELEVANT = 0.5
"""A passage is relevant above this relevance."""
Vectors: TypeAlias = dict[str, list[float]]
"""The vector of each text of a row by its name: query, passage, passage_2, negative and so on."""
RANKED = 1000
"""Passages of a query whose order counts; others count as not found."""
AT_ONCE = 256
"""Queries compared with all passages at a time."""
SIGNATURE = "mean over queries with a relevant passage; equal scores count as the mean of their orders"
SEARCHED = "searched in "
"""In a signature, before the number and hash of the passages."""


@dataclass(frozen=True)
class RankedQuery:
    """The scored passages of one query, in any order."""

    scores: Sequence[float] | Floats
    relevances: Sequence[float] | Floats
    """Of the same passages; a negative relevance counts as 0."""
    unranked: Sequence[float] = ()
    """Relevances of passages without a score, such as those below the top of a large corpus."""
    name: str = ""
    """Hash of the query and its candidates (`name_query`); two rankings are compared only if they are equal."""

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
    measured, names = measure_shares(metric, values, SIGNATURE), [queries[i].name for i in kept]
    return replace(measured, at=tuple(at[i] if at else i for i in kept), names=name_rows(names) if all(names) else ())


def name_query(query: str, candidates: Iterable[tuple[str, float]]) -> str:
    """Hash a query with its candidates and their relevances, in any order; outer white space makes no difference."""
    return hash_value([query.strip(), sorted({(text.strip(), float(relevance)) for text, relevance in candidates})])


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


# Search with vectors


def unit(vector: Sequence[float] | NDArray[np.float32]) -> Floats:
    """Return a vector scaled to length 1; zeros stay."""
    numbers = np.asarray(vector, dtype=np.float64)
    return np.asarray(numbers / max(float(np.linalg.norm(numbers)), 1e-12))


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the cosine of two vectors; 0 if one is all zeros."""
    return float(np.dot(unit(one), unit(other)))


def format_vectors(vectors: Vectors) -> str:
    """Write the cosine of the first two texts, or the vector of a single text as a JSON list."""
    first, *others = vectors.values()
    if others:
        return f"cosine {cosine(first, others[0]):.3f}"
    return "[" + ", ".join(f"{number:.6g}" for number in first) + "]"


def measure_vectors(unit_ND: Floats) -> tuple[float, float]:
    """Return the mean cosine of two different vectors of length 1, and their effective rank."""
    count = len(unit_ND)
    total, moments_DD = unit_ND.sum(0), unit_ND.T @ unit_ND
    return float((total @ total - count) / max(1, count * (count - 1))), count**2 / float((moments_DD**2).sum())


def measure_spread(metric: str, vectors: Sequence[Vectors]) -> Measure:
    """Measure how different the vectors of unrelated texts are; each row adds its last text.

    The effective rank is the participation ratio of the vectors' second moments: 1 over the mean squared cosine.
    """
    unit_ND = np.stack([unit([*one.values()][-1]) for one in vectors]) if vectors else np.zeros((0, 1))
    count = len(unit_ND)
    if metric == "random_cosine":
        cosine_N = (unit_ND @ unit_ND.sum(0) - 1) / max(1, count - 1)
        return measure_means(metric, cosine_N.tolist(), "mean cosine of each row's text with those of other rows")
    squared_N = ((unit_ND @ (unit_ND.T @ unit_ND)) * unit_ND).sum(1) / count
    signature = "participation ratio of the vectors: 1 if all are parallel, at most their length"
    return Measure(metric, columns(np.ones(count), squared_N), rows_by_squares, signature=signature)


Prepare: TypeAlias = Callable[[Sequence[Any]], Callable[[Sequence[Any]], Floats]]
"""Takes all passages, and returns a function that scores them for some queries, [Q, P]."""


def prepare_vectors(vectors: Sequence[Sequence[float] | NDArray[np.float32]]) -> Callable[[Sequence[Any]], Floats]:
    """Return a function that computes the cosines of queries with all passages; takes vectors."""
    passages_PD = unit_rows(vectors, len(vectors))
    return lambda queries: np.stack([unit(one) for one in queries]) @ passages_PD.T


def unit_rows(vectors: Iterable[Sequence[float] | NDArray[np.float32]], count: int) -> Floats:
    """Return vectors scaled to length 1, [count, D]; zeros stay."""
    rows_PD: Floats | None = None
    for i, vector in enumerate(vectors):
        if rows_PD is None:
            rows_PD = np.empty((count, len(vector)))
        rows_PD[i] = unit(vector)
    assert rows_PD is not None, "there are passages"
    return rows_PD


def search(
    queries: Sequence[Any],
    score: Callable[[Sequence[Any]], Floats],
    judgments: Sequence[tuple[int, set[int], int | None]],
) -> Iterator[tuple[int, RankedQuery]]:
    """Yield the row of each query with its best passages, leaving out the query itself.

    `score` returns the scores [Q, P] of all passages for some queries. `judgments` has for each query its row, its
    relevant passages, and the passage that is the query itself, if any.
    """
    for start in range(0, len(queries), AT_ONCE):
        part = judgments[start : start + AT_ONCE]
        scores_QP = score(queries[start : start + AT_ONCE])
        for scores_P, (row, relevant, itself) in zip(scores_QP, part, strict=True):
            if itself is not None:
                scores_P[itself] = -np.inf
            count = min(RANKED, len(scores_P) - (itself is not None))
            near = np.argpartition(-scores_P, count - 1)[:count] if 0 < count < len(scores_P) else np.arange(count)
            best = near[np.argsort(-scores_P[near], kind="stable")]
            ranked = set(best.tolist())
            relevances = [float(place in relevant) for place in best.tolist()]
            yield row, RankedQuery(scores_P[best], relevances, [1.0 for place in relevant if place not in ranked])
