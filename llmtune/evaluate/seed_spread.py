"""Scores over several seeds: their spread, and whether the gain over the base exceeds it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from llmtune.display.number_format import join_names
from llmtune.evaluate.control_run_verdict import count_beaten
from llmtune.evaluate.metric_info import COSTS, better_side
from llmtune.store.report_record import SeedRun, Seeds, Spread
from llmtune.store.resource_limits import LARGEST_NUMBER
from llmtune.store.score_records import Evaluation


def describe_spread(scored: Mapping[int, Evaluation], missing: Sequence[int]) -> Seeds:
    """Return each seed's scores and their spread; `scored` has the run's own seed first."""
    first = next(iter(scored.values()))
    shared = [metric for metric in first.tuned if all(metric in one.tuned for one in scored.values())]
    metrics = {
        metric: spread(metric, [one.tuned[metric] for one in scored.values()], first.base.get(metric))
        for metric in shared
    }
    runs = []
    for seed, one in scored.items():
        ends = {name: (change.low, change.high) for name, change in one.difference.items() if name in shared}
        tuned = {name: one.tuned[name] for name in shared}
        runs.append(SeedRun(seed, tuned, {name: ends[name] for name in shared if name in ends}))
    sentences = [describe_gain(metrics, len(scored), missing), count_beaten(scored.values())]
    return Seeds(runs, missing, metrics, " ".join(sentence for sentence in sentences if sentence))


def spread(metric: str, scores: Sequence[float], base: float | None) -> Spread:
    """Return mean, deviation and range of the scores, and whether the gain over the base exceeds their range.

    Numbers are None for a single seed, without a base, or if a score is not finite, or too large for a mean.
    """
    if len(scores) < 2 or not all(abs(score) <= LARGEST_NUMBER for score in scores):
        return Spread(list(scores), base)
    mean, between, better = statistics.fmean(scores), max(scores) - min(scores), better_side(metric)
    gain = mean - base if base is not None and math.isfinite(base) else None
    return Spread(
        scores=list(scores),
        base=base,
        mean=mean,
        deviation=statistics.stdev(scores),
        lowest=min(scores),
        highest=max(scores),
        spread=between,
        gain=gain,
        larger=abs(gain) > between if gain is not None and better else None,
        better=None if gain is None else better * gain > 0,
    )


def describe_gain(metrics: Mapping[str, Spread], count: int, missing: Sequence[int]) -> str:
    """Return a sentence on whether the gain over the base exceeds the spread between seeds; costs do not count.

    A second sentence names seeds without scores.
    """
    judged = {name: one for name, one in metrics.items() if one.larger is not None and name not in COSTS}
    larger = [name for name, one in judged.items() if one.larger and one.better]
    within = [name for name, one in judged.items() if not one.larger]
    worse = [name for name, one in judged.items() if one.larger and not one.better]
    left = f" No scores yet: seed {', '.join(map(str, missing))}." if missing else ""
    if not judged:
        return f"The spread is unknown, so the gain over the base cannot be compared with it.{left}"
    between = f"the spread between {count} seeds"
    parts = []
    if larger:
        parts.append(f"the gain over the base is larger than {between} in {join_names(larger)}")
    if within:
        what = "it is not" if larger else f"the gain over the base is not larger than {between}"
        parts.append(f"{what} in {join_names(within)}")
    if worse:
        by = "that spread" if parts else between
        parts.append(f"the tuned model is worse than the base by more than {by} in {join_names(worse)}")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}.{left}"


def warn_of_spread(seeds: Seeds | None, metrics: Sequence[str]) -> str:
    """Return a sentence for the verdict if a gain in one of `metrics` is within the spread, else an empty string."""
    spreads = seeds.metrics if seeds else {}
    within = [metric for metric in metrics if metric in spreads and spreads[metric].larger is False]
    if not seeds or not within:
        return ""
    return (
        f"The gain may disappear with another seed: in {join_names(within)} the spread of {len(seeds.runs)} seeds is "
        "at least as large as the gain."
    )
