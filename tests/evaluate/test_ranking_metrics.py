"""Ranking metrics, compared with ir-measures."""

import itertools
import math
import random
import warnings

import numpy as np
import pytest

from llmtune.evaluate.metric import paired_difference
from llmtune.evaluate.ranking_metrics import RankedQuery, measure_ranking
from llmtune.recipe.task_facts import RANKING

METRICS = {
    "ndcg@10": "nDCG@10",
    "ndcg@3": "nDCG@3",
    "mrr@10": "RR@10",
    "mrr@2": "RR@2",
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "recall@17": "R@17",
    "map": "AP",
}
"""By our names those of ir-measures."""
REFEREED = [
    pytest.param(name, marks=[pytest.mark.promise("metric", "referee", equal="ir-measures, within 1e-9", place=name)])
    if name in RANKING
    else name
    for name in METRICS
]


def referee(metric: str, queries: list[RankedQuery]) -> dict[int, float]:
    """Return each query's value; equal scores are ordered by position, the first best."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ir_measures
    known: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for i, query in enumerate(queries):
        size = len(query.scores)
        known[str(i)] = {f"{size - j:04}": int(one) for j, one in enumerate(query.relevances)}
        known[str(i)] |= {f"u{j}": int(one) for j, one in enumerate(query.unranked)}
        run[str(i)] = {f"{size - j:04}": float(one) for j, one in enumerate(query.scores)}
    wanted = ir_measures.parse_measure(METRICS[metric])
    return {int(one.query_id): one.value for one in ir_measures.iter_calc([wanted], known, run)}


def random_queries(seed: int, scores: int) -> list[RankedQuery]:
    draw = random.Random(seed)
    queries = []
    for _ in range(40):
        size = draw.randint(1, 30)
        relevances = [draw.choice([0, 0, 0, 0, 1, 2, 3]) for _ in range(size)]
        unranked = [draw.choice([0, 1, 2]) for _ in range(draw.randint(0, 2))]
        numbers = [draw.randint(0, scores) / 64 for _ in range(size)]
        queries.append(RankedQuery(numbers, relevances, unranked))
    return [*queries, RankedQuery([1, 2], [0, 0])]


@pytest.mark.parametrize("metric", REFEREED)
def test_values_equal_those_of_ir_measures_for_graded_relevance(metric: str) -> None:
    queries = [
        RankedQuery(np.random.default_rng(i).permutation(len(query.scores)), query.relevances, query.unranked)
        for i, query in enumerate(random_queries(1, 10))
    ]
    measured, wanted = measure_ranking(metric, queries), referee(metric, queries)
    assert len(measured.at) < len(queries)  # those without a relevant passage are left out
    for query, sums in zip(measured.at, measured.sums_NK, strict=True):
        assert sums[0] == pytest.approx(wanted[query], abs=1e-9)
    assert measured.value == pytest.approx(sum(wanted[i] for i in measured.at) / len(measured.at))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_scores_count_as_the_mean_of_all_their_orders(metric: str) -> None:
    draw = random.Random(5)
    for _ in range(12):
        size = draw.randint(1, 6)
        passages = [(draw.randint(0, 2), draw.choice([0, 0, 1, 3])) for _ in range(size)]
        orders = [RankedQuery(*zip(*order, strict=True), (1,)) for order in itertools.permutations(passages)]
        mean = sum(referee(metric, orders).values()) / len(orders)
        assert [measure_ranking(metric, [one]).value for one in orders] == pytest.approx([mean] * len(orders))


def test_the_order_of_the_rows_changes_nothing_and_constant_scores_rank_like_chance() -> None:
    relevances = [1.0, 0, 0, 0]
    for order in itertools.permutations(relevances):
        assert measure_ranking("recall@1", [RankedQuery([0.3] * 4, order)]).value == pytest.approx(0.25)
    chance = sum(1 / rank for rank in range(1, 5)) / 4
    assert measure_ranking("mrr@10", [RankedQuery([0.3] * 4, relevances)]).value == pytest.approx(chance)


def test_a_model_is_paired_over_queries_and_rows_of_a_cluster_stay_together() -> None:
    queries = random_queries(2, 10)
    better = [RankedQuery(query.relevances, query.relevances, query.unranked) for query in queries]
    base, tuned = (measure_ranking("ndcg@10", one, at=range(0, 82, 2)) for one in (queries, better))
    change = paired_difference(base, tuned, 1)
    assert change.n == len(tuned.at) == sum(query.has_relevant for query in queries)
    assert set(tuned.at) <= set(range(0, 82, 2))
    assert change.low > 0
    grouped = [one.in_clusters([row // 8 for row in range(82)]) for one in (base, tuned)]
    assert paired_difference(*grouped, 1).groups == len({row // 8 for row in tuned.at})


def test_floats_above_one_half_are_relevant_and_negative_ones_gain_nothing() -> None:
    query = RankedQuery([3, 2, 1], [-1.5, 0.5, 0.75])
    assert measure_ranking("mrr@10", [query]).value == pytest.approx(1 / 3)
    assert measure_ranking("ndcg@10", [query]).value == pytest.approx(
        (0.5 / math.log2(3) + 0.75 / 2) / (0.75 + 0.5 / math.log2(3))
    )


def test_unranked_passages_count_as_missed() -> None:
    assert measure_ranking("recall@10", [RankedQuery([1.0], [1.0], [1.0, 1.0])]).value == pytest.approx(1 / 3)
    assert measure_ranking("map", [RankedQuery([], [], [1.0])]).value == 0
