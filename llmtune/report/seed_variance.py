"""Several seeds: each one's scores, their mean and spread, and whether the gain over the base is larger than it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.records import Evaluation
from llmtune.report.metric_info import COSTS, better_side

Facts = Mapping[str, Any]


def describe_spread(found: Mapping[int, Evaluation], missing: Sequence[int]) -> dict[str, Any]:
    """Return `runs`, `missing`, `metrics` and `told` for the report; `found` has the run's own seed first."""
    first = next(iter(found.values()))
    shared = [metric for metric in first.tuned if all(metric in one.tuned for one in found.values())]
    metrics = {
        metric: spread(metric, [one.tuned[metric] for one in found.values()], first.base.get(metric))
        for metric in shared
    }
    runs = [
        {
            "seed": seed,
            "tuned": {metric: one.tuned[metric] for metric in shared},
            "interval": {
                metric: [one.difference[metric].low, one.difference[metric].high]
                for metric in shared
                if metric in one.difference
            },
        }
        for seed, one in found.items()
    ]
    return {"runs": runs, "missing": list(missing), "metrics": metrics, "told": tell(metrics, len(found), missing)}


def spread(metric: str, scores: Sequence[float], base: float | None) -> dict[str, Any]:
    """Return mean, sample standard deviation, lowest, highest, and the gain of the mean over the base.

    `larger` says whether that gain, for better or worse, is larger than what lies between the lowest and the highest
    seed; None where there is nothing to say: one seed, no base, or a score that is not a number.
    """
    known = len(scores) > 1 and all(math.isfinite(score) for score in scores)
    mean = statistics.fmean(scores) if known else None
    gain = mean - base if mean is not None and base is not None and math.isfinite(base) else None
    between = max(scores) - min(scores) if known else None
    judged = gain is not None and between is not None and better_side(metric) != 0
    return {
        "scores": list(scores),
        "base": base,
        "mean": mean,
        "deviation": statistics.stdev(scores) if known else None,
        "lowest": min(scores) if known else None,
        "highest": max(scores) if known else None,
        "spread": between,
        "gain": gain,
        "larger": abs(gain) > between if judged and gain is not None and between is not None else None,
        "better": None if gain is None else better_side(metric) * gain > 0,
    }


def tell(metrics: Facts, count: int, missing: Sequence[int]) -> str:
    """Say in one sentence whether the gain over the base is larger than the spread between seeds; costs do not count.

    Seeds that have no scores yet are told in a second one.
    """
    judged = {name: one for name, one in metrics.items() if one["larger"] is not None and name not in COSTS}
    larger = [name for name, one in judged.items() if one["larger"] and one["better"]]
    within = [name for name, one in judged.items() if not one["larger"]]
    worse = [name for name, one in judged.items() if one["larger"] and not one["better"]]
    left = f" Not there yet: seed {', '.join(map(str, missing))}." if missing else ""
    if not judged:
        return f"There is no spread to hold the gain over the base against.{left}"
    between = f"the spread between {count} seeds"
    parts = []
    if larger:
        parts.append(f"the gain over the base is larger than {between} in {named(larger)}")
    if within:
        what = "it is not" if larger else f"the gain over the base is not larger than {between}"
        parts.append(f"{what} in {named(within)}")
    if worse:
        by = "that spread" if parts else between
        parts.append(f"the tuned model is worse than the base by more than {by} in {named(worse)}")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}.{left}"


def warn(evaluation: Facts, metrics: Sequence[str]) -> str:
    """Return a sentence for the verdict where a gain in one of `metrics` is within the spread, else an empty text."""
    seeds = evaluation.get("seeds") or {}
    known = seeds.get("metrics") or {}
    within = [metric for metric in metrics if (known.get(metric) or {}).get("larger") is False]
    if not within:
        return ""
    return (
        f"With another seed that may be gone: in {named(within)} {len(seeds['runs'])} seeds lie as far apart as "
        "the gain is large, or farther."
    )


def named(metrics: Sequence[str]) -> str:
    """Join names of metrics into words."""
    words = [metric.replace("_", " ") for metric in metrics]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
