"""What lm-eval found, by metric: its own score, and each question's part in it, so that two models can be compared.

Shapes: N questions, K sums a question, G tasks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.evaluate.lm_eval_harness.tasks import Benchmark
from llmtune.evaluate.metric import Measure, columns, measure_means, measure_right, ratio
from llmtune.evaluate.paired_statistics import Floats
from llmtune.recipe.eval_suites_section import plain_name

NO_FILTER = "none"
CLOSE = 1e-9


@dataclass(frozen=True)
class Score:
    """One metric of one task or group."""

    task: str
    """lm-eval's name of the task or group."""
    metric: str
    filter: str
    value: float
    better: int
    measure: Measure | None
    """None where the score does not add up question by question."""
    questions: tuple[Any, ...] = ()
    """[N] which questions stand in the measure."""


def score_name(benchmark: Benchmark, score: Score) -> str:
    """Return what a gate calls a score: `task.metric`, and its filter where there is one."""
    parts = [benchmark.plain(score.task), plain_name(score.metric)]
    return ".".join(parts if score.filter == NO_FILTER else [*parts, plain_name(score.filter)])


def read_scores(benchmark: Benchmark, results: Mapping[str, Any]) -> list[Score]:
    """Return the scores of a benchmark's groups and tasks, as lm-eval has put them into `results`."""
    found = []
    for name, task in benchmark.tasks.items():
        for metric, filtered, value in numbers_of(results["results"][name]):
            measure, questions = measure_task(task, metric, filtered, results["samples"][name])
            kept = measure if measure is not None and agrees(measure.value, value) else None
            better = direction(results, name, metric)
            found.append(Score(name, metric, filtered, value, better, kept, questions))
    for name, group in benchmark.groups.items():
        for metric, filtered, value in numbers_of(results["results"].get(name, {})):
            parts = [
                one for one in found if one.task in leaves(group) and (one.metric, one.filter) == (metric, filtered)
            ]
            measure, questions = measure_group(group, metric, parts)
            kept = measure if measure is not None and agrees(measure.value, value) else None
            found.append(Score(name, metric, filtered, value, direction(results, name, metric), kept, questions))
    return found


def numbers_of(result: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return (metric, filter, score) of lm-eval's `metric,filter: score`; standard errors are left out."""
    split = ((*key.rpartition(",")[::2], value) for key, value in result.items() if "," in key)
    return [
        (metric, filtered, float(value))
        for metric, filtered, value in split
        if not metric.endswith("_stderr") and is_number(value)
    ]


def is_number(value: object) -> bool:
    """Whether a value is a number or a truth value."""
    return isinstance(value, bool | int | float | np.number | np.bool_)


def agrees(measured: float, told: float) -> bool:
    """Whether the sum over questions is the score that lm-eval tells."""
    return math.isclose(measured, told, rel_tol=CLOSE, abs_tol=CLOSE)


def direction(results: Mapping[str, Any], name: str, metric: str) -> int:
    """Return 1 where more is better, -1 where less is, 0 where lm-eval does not say."""
    better = results["higher_is_better"].get(name, {}).get(metric)
    return 0 if better is None else 1 if better else -1


def measure_task(
    task: Any, metric: str, filtered: str, samples: list[dict[str, Any]]
) -> tuple[Measure | None, tuple[Any, ...]]:
    """Return a metric from each question's part in it, and the questions; None where it is more than a sum of parts."""
    asked = [one for one in samples if one["filter"] == filtered and metric in one]
    values, questions = [one[metric] for one in asked], tuple(one["doc_id"] for one in asked)
    kind = getattr(task.aggregation().get(metric), "__name__", "mean")
    if kind in ("mean", "perplexity") and values and all(map(is_number, values)):
        numbers = [float(value) for value in values]
        if kind == "perplexity":
            return Measure(
                metric, columns(np.array(numbers), np.ones(len(numbers))), exponent, signature=kind
            ), questions
        right = set(numbers) <= {0.0, 1.0}
        measure = measure_right([bool(n) for n in numbers], metric) if right else measure_means(metric, numbers, kind)
        return measure, questions
    formula = WEIGHTED.get(kind)
    if formula is not None and values and all(isinstance(one, tuple | list) and len(one) == 2 for one in values):
        return Measure(metric, np.array(values, dtype=np.float64), formula, signature=kind), questions
    return None, questions


def exponent(sums: Floats) -> Floats:
    """[..., (nats, weight)] -> [...] perplexity."""
    return np.asarray(np.exp(-ratio(sums)), dtype=np.float64)


def bits(sums: Floats) -> Floats:
    """[..., (nats, bytes)] -> [...] bits per byte."""
    return np.asarray(-ratio(sums) / math.log(2), dtype=np.float64)


WEIGHTED: dict[str, Callable[[Floats], Floats]] = {"weighted_perplexity": exponent, "bits_per_byte": bits}
"""Scores of a sum over a sum, by lm-eval's name of how they are put together."""


def leaves(group: Any) -> set[str]:
    """Return the tasks of a group and of the groups in it, by lm-eval's names."""
    return {one.task_name for one in group.get_all_tasks()}


def measure_group(group: Any, metric: str, parts: list[Score]) -> tuple[Measure | None, tuple[Any, ...]]:
    """Return a group's mean over its tasks, weighed by their questions or all alike, from the questions' parts."""
    kinds = [one for one in group.aggregate_metric_list if one.metric == metric]
    means = [one.measure for one in parts if one.measure is not None and one.measure.formula is ratio]
    if len(kinds) != 1 or not means or len(means) < len(parts):
        return None, ()
    questions = tuple((one.task, question) for one in parts for question in one.questions)
    if kinds[0].weight_by_size or len(means) == 1:
        right = all(one.right_wrong for one in means)
        return Measure(metric, np.concatenate([one.sums_NK for one in means]), ratio, right), questions
    sums_NK = np.zeros((sum(len(one.sums_NK) for one in means), 2 * len(means)))
    start = 0
    for g, one in enumerate(means):
        sums_NK[start : start + len(one.sums_NK), 2 * g : 2 * g + 2] = one.sums_NK
        start += len(one.sums_NK)
    return Measure(metric, sums_NK, mean_of_ratios), questions


def mean_of_ratios(sums: Floats) -> Floats:
    """[..., 2 G] -> [...]: the mean over G tasks, each a sum over its questions."""
    by_task = sums.reshape(*sums.shape[:-1], -1, 2)
    return np.asarray(ratio(by_task).mean(-1), dtype=np.float64)
