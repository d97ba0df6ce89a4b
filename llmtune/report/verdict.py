"""The verdict: did the tuning help, by the intervals of the differences alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})
CHOICE = "choice_accuracy"
LIKELIHOOD = ("loss", "bits_per_byte", "perplexity")
"""One finding in three units."""
FEWEST_ROWS = 10
HELPED, HARMED, MIXED, UNKNOWN = "helped", "harmed", "mixed", "can't tell"


def verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """Return `word` (helped, harmed, mixed, can't tell) and `reason`, one sentence or two.

    A metric speaks where the 95 % interval of its difference leaves zero out and at least ten rows were measured. Where
    answers were also compared by likelihood (`choice_accuracy`) and that did not move, a gain elsewhere may be answer
    format alone, and the verdict is that one can't tell.
    """
    evaluation = report.get("evaluation")
    if not evaluation or not evaluation.get("difference"):
        return {"word": UNKNOWN, "reason": "Nothing was measured on held-out rows."}
    changes = {metric: change for metric, change in evaluation["difference"].items() if change["n"] >= FEWEST_ROWS}
    if not changes:
        rows = max(change["n"] for change in evaluation["difference"].values())
        return {"word": UNKNOWN, "reason": f"{rows} held-out rows are too few; at least {FEWEST_ROWS} are needed."}
    signs = {metric: direction(metric, change["interval"]) for metric, change in changes.items()}
    better = distinct([metric for metric, sign in signs.items() if sign > 0])
    worse = distinct([metric for metric, sign in signs.items() if sign < 0])
    if better and worse:
        reason = f"Better in {listed(better)}, worse in {listed(worse)}."
        return {"word": MIXED, "reason": f"{reason} Read the samples before you decide."}
    if worse:
        return {"word": HARMED, "reason": f"Worse in {listed(worse)}; every other interval includes zero."}
    if not better:
        return {
            "word": UNKNOWN,
            "reason": "Every interval includes zero: more held-out rows, or more training, would tell.",
        }
    if CHOICE in signs and CHOICE not in better:
        reason = f"Better in {listed(better)}, but choosing among the possible answers did not change beyond chance"
        return {"word": UNKNOWN, "reason": f"{reason}: what was learned may be the format of answers alone."}
    return {"word": HELPED, "reason": f"Better in {listed(better)}, and worse in nothing that was measured."}


def direction(metric: str, interval: Any) -> int:
    """Return 1 where the interval lies wholly on the better side of zero, -1 on the worse, 0 otherwise."""
    low, high = (math.nan if end is None else float(end) for end in interval)
    sign = 1 if low > 0 else -1 if high < 0 else 0
    return -sign if metric in LOWER_IS_BETTER else sign


def distinct(metrics: list[str]) -> list[str]:
    """Keep one of the metrics that say the same in other units."""
    same = [metric for metric in LIKELIHOOD if metric in metrics]
    return [metric for metric in metrics if metric not in same[1:]]


def listed(names: list[str]) -> str:
    """Join metric names into words."""
    words = [name.replace("_", " ") for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
