"""The verdict: did the tuning help, by the intervals of the differences alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.report.meanings import CHOICE, COSTS, direction

SAME_FINDING = (("loss", "bits_per_byte", "perplexity"), ("wer", "cer"))
"""One finding in several units."""
TWINS = ("accuracy", "f1_micro")
"""One number under two names where a row has one label; then, and only then, both changes are equal."""
FEWEST_ROWS = 10
HELPED, HARMED, MIXED, UNKNOWN = "helped", "harmed", "mixed", "can't tell"
PRICE = "The price: the tuned model is farther from the base model (kl)."


def verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """Return `word` (helped, harmed, mixed, can't tell) and `reason`, one sentence or a few.

    A metric speaks where the 95 % interval of its difference leaves zero out and at least ten rows were measured. Where
    answers were also compared by likelihood (`choice_accuracy`) and that did not move, a gain elsewhere may be answer
    format alone, and the verdict is that one can't tell. A cost (`kl`) is told and decides nothing. Where a trivial
    baseline stands for the base model, the reason names it.
    """
    evaluation = report.get("evaluation") or {}
    found = evaluation.get("difference")
    if not found:
        return {"word": UNKNOWN, "reason": _nothing_compared(evaluation)}
    changes = {metric: change for metric, change in found.items() if change["n"] >= FEWEST_ROWS}
    if not changes:
        rows = max(change["n"] for change in found.values())
        return {"word": UNKNOWN, "reason": f"{rows} held-out rows are too few; at least {FEWEST_ROWS} are needed."}
    word, reason = _weigh(changes, evaluation.get("baseline"))
    paid = any(direction(metric, changes[metric]["interval"]) < 0 for metric in COSTS & changes.keys())
    return {"word": word, "reason": f"{reason} {PRICE}" if paid else reason}


def _nothing_compared(evaluation: Mapping[str, Any]) -> str:
    if evaluation.get("tuned"):
        return "Only the tuned model has scores: there is nothing to hold them against."
    return "Nothing was measured on held-out rows."


def _weigh(changes: Mapping[str, Any], baseline: str | None) -> tuple[str, str]:
    """Return word and reason by those metrics that are no cost."""
    signs = {metric: direction(metric, change["interval"]) for metric, change in changes.items() if metric not in COSTS}
    better = distinct([metric for metric, sign in signs.items() if sign > 0], changes)
    worse = distinct([metric for metric, sign in signs.items() if sign < 0], changes)
    than = f" than {baseline}" if baseline else ""
    if better and worse:
        reason = f"Better in {listed(better)}{than}, worse in {listed(worse)}."
        return MIXED, f"{reason} Read the samples before you decide."
    if worse:
        return HARMED, f"Worse in {listed(worse)}{than}, and better in nothing that was measured."
    if not better:
        moved = f"No score is better or worse{than} beyond chance"
        return UNKNOWN, f"{moved}: more held-out rows, or more training, would tell."
    if CHOICE in signs and CHOICE not in better:
        reason = f"Better in {listed(better)}, but choosing among the possible answers did not change beyond chance"
        return UNKNOWN, f"{reason}: what was learned may be the format of answers alone."
    return HELPED, f"Better in {listed(better)}{than}, and worse in nothing that was measured."


def distinct(metrics: list[str], changes: Mapping[str, Any]) -> list[str]:
    """Keep one of the metrics that say the same in other units or under another name."""
    left_out = {metric for group in SAME_FINDING for metric in [one for one in group if one in metrics][1:]}
    if all(metric in metrics for metric in TWINS):
        first, second = (changes[metric]["value"] for metric in TWINS)
        if first is not None and second is not None and abs(first - second) < 1e-9:  # rounding of two ways to the same
            left_out.add(TWINS[1])
    return [metric for metric in metrics if metric not in left_out]


def listed(names: list[str]) -> str:
    """Join metric names into words."""
    words = [name.replace("_", " ") for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
