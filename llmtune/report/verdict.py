"""The verdict: did the tuning help, by the intervals of the differences alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.report.metric_info import CHOICE, COSTS, better_side, direction
from llmtune.report.seed_variance import warn

SAME_FINDING = (("loss", "bits_per_byte", "perplexity"),)
"""One number in several units."""
ALIKE = (*SAME_FINDING, ("wer", "cer"))
"""One finding in several measures: named once."""
CHANCE = 0.05
TWINS = ("accuracy", "f1_micro")
"""One number under two names where a row has one label; then, and only then, both changes are equal."""
FEWEST_ROWS = 10
HELPED, HARMED, MIXED, UNKNOWN = "helped", "harmed", "mixed", "can't tell"
PRICE = "The price: the tuned model is farther from the base model (kl)."


def verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """Return `word` (helped, harmed, mixed, can't tell) and `reason`, one sentence or a few.

    It is told by the metrics that speak. Where answers were also compared by likelihood (`choice_accuracy`) and that
    did not move, a gain elsewhere may be answer format alone, and the verdict is that one can't tell. A cost (`kl`) is
    told and decides nothing. Where a trivial baseline stands for the base model, the reason names it.
    """
    evaluation = report.get("evaluation") or {}
    found = evaluation.get("difference")
    if not found:
        return {"word": UNKNOWN, "reason": _nothing_compared(evaluation)}
    changes = countable(found)
    if not changes:
        rows = max(change["n"] for change in found.values())
        return {"word": UNKNOWN, "reason": f"{rows} held-out rows are too few; at least {FEWEST_ROWS} are needed."}
    word, reason = _weigh(changes, evaluation.get("baseline"))
    paid = any(direction(metric, changes[metric]["interval"]) < 0 for metric in COSTS & changes.keys())
    gained = [metric for metric, sign in speaking(changes).items() if sign > 0]
    parts = [reason, warn(evaluation, gained), PRICE if paid else ""]
    return {"word": word, "reason": " ".join(part for part in parts if part)}


def countable(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the differences that enough rows were measured for."""
    return {metric: change for metric, change in found.items() if change["n"] >= FEWEST_ROWS}


def speaking(found: Mapping[str, Any]) -> dict[str, int]:
    """Return the metrics that changed beyond chance: 1 for the better, -1 for the worse.

    The 95 % interval leaves zero out, at least ten rows were measured, and p holds for all metrics together, so that
    only one in twenty evaluations without any change is said to have one, however many metrics it looks at: Holm, "A
    Simple Sequentially Rejective Multiple Test Procedure", 1979. Metrics that say the same in other units count once.
    Costs (`kl`) and what has no better side do not speak.
    """
    changes = countable(found)
    signs = {metric: direction(metric, change["interval"]) for metric, change in changes.items() if metric not in COSTS}
    signs = {metric: sign for metric, sign in signs.items() if better_side(metric)}
    counted = distinct(list(signs), changes)
    held = holm({metric: 1.0 if (p := changes[metric]["p"]) is None else p for metric in counted})
    groups = (*SAME_FINDING, TWINS)
    held |= {
        metric for metric in signs.keys() - counted if any(metric in group and held & {*group} for group in groups)
    }
    return {metric: sign for metric, sign in signs.items() if sign and metric in held}


def _nothing_compared(evaluation: Mapping[str, Any]) -> str:
    if evaluation.get("tuned"):
        return "Only the tuned model has scores: there is nothing to hold them against."
    return "Nothing was measured on held-out rows."


def _weigh(changes: Mapping[str, Any], baseline: str | None) -> tuple[str, str]:
    """Return word and reason by those metrics that are no cost."""
    signs = speaking(changes)
    better = distinct([metric for metric, sign in signs.items() if sign > 0], changes, ALIKE)
    worse = distinct([metric for metric, sign in signs.items() if sign < 0], changes, ALIKE)
    than = f" than {baseline}" if baseline else ""
    if better and worse:
        reason = f"Better in {listed(better)}{than}, worse in {listed(worse)}."
        return MIXED, f"{reason} Read the samples before you decide."
    if worse:
        return HARMED, f"Worse in {listed(worse)}{than}, and better in nothing that was measured."
    if not better:
        moved = f"No score is better or worse{than} beyond chance"
        moved_alone = [metric for metric in changes.keys() - COSTS if direction(metric, changes[metric]["interval"])]
        if moved_alone:
            moved += f" (the interval of {listed(sorted(moved_alone))} leaves zero out, as one of many metrics may)"
        return UNKNOWN, f"{moved}: more held-out rows, or more training, would tell."
    if CHOICE in changes and CHOICE not in better:
        reason = f"Better in {listed(better)}, but choosing among the possible answers did not change beyond chance"
        return UNKNOWN, f"{reason}: what was learned may be the format of answers alone."
    return HELPED, f"Better in {listed(better)}{than}, and worse in nothing that was measured."


def holm(ps: Mapping[str, float]) -> set[str]:
    """Return those whose p holds at 5 % for all of them together."""
    held = set[str]()
    for place, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        if p > CHANCE / (len(ps) - place):
            break
        held.add(name)
    return held


def distinct(
    metrics: list[str], changes: Mapping[str, Any], groups: Sequence[tuple[str, ...]] = SAME_FINDING
) -> list[str]:
    """Keep one of the metrics that say the same in other units or under another name."""
    left_out = {metric for group in groups for metric in [one for one in group if one in metrics][1:]}
    if all(metric in metrics for metric in TWINS):
        first, second = (changes[metric]["value"] for metric in TWINS)
        if first is not None and second is not None and abs(first - second) < 1e-9:  # rounding of two ways to the same
            left_out.add(TWINS[1])
    return [metric for metric in metrics if metric not in left_out]


def listed(names: list[str]) -> str:
    """Join metric names into words."""
    words = [name.replace("_", " ") for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
