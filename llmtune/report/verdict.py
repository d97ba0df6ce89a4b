"""The verdict: did the tuning help, by the intervals of the differences alone; and over several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from statistics import fmean

from llmtune.records import Difference, Evaluation
from llmtune.report.metric_info import CHOICE, COSTS, better_side, direction
from llmtune.report.number_format import missing
from llmtune.report.report_record import SeedRun, Seeds, Spread, Verdict


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
    return Seeds(runs, missing, metrics, describe_gain(metrics, len(scored), missing))


def spread(metric: str, scores: Sequence[float], base: float | None) -> Spread:
    """Return mean, deviation and ends of the scores, and whether the gain over the base is larger than they are apart.

    There is nothing to say of one seed, without a base, or where a score is not a number.
    """
    if len(scores) < 2 or not all(map(math.isfinite, scores)):
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
    """Say in one sentence whether the gain over the base is larger than the spread between seeds; costs do not count.

    Seeds that have no scores yet are told in a second one.
    """
    judged = {name: one for name, one in metrics.items() if one.larger is not None and name not in COSTS}
    larger = [name for name, one in judged.items() if one.larger and one.better]
    within = [name for name, one in judged.items() if not one.larger]
    worse = [name for name, one in judged.items() if one.larger and not one.better]
    left = f" Not there yet: seed {', '.join(map(str, missing))}." if missing else ""
    if not judged:
        return f"There is no spread to hold the gain over the base against.{left}"
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
    """Return a sentence for the verdict where a gain in one of `metrics` is within the spread, else an empty text."""
    known = seeds.metrics if seeds else {}
    within = [metric for metric in metrics if metric in known and known[metric].larger is False]
    if not seeds or not within:
        return ""
    return (
        f"With another seed that may be gone: in {join_names(within)} {len(seeds.runs)} seeds lie as far apart as "
        "the gain is large, or farther."
    )


def join_names(metrics: Sequence[str]) -> str:
    """Join names of metrics into words."""
    words = [metric.replace("_", " ") for metric in metrics]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


SAME_FINDING = (("loss", "bits_per_byte", "perplexity"),)
"""One number in several units."""
ALIKE = (*SAME_FINDING, ("wer", "cer"))
"""One finding in several measures: named once."""
CHANCE = 0.05
TWINS = ("accuracy", "f1_micro")
"""One number under two names where a row has one label; then, and only then, both changes are equal."""
FEWEST_ROWS = 10
Differences = Mapping[str, Difference]
HELPED, HARMED, MIXED, UNKNOWN = "helped", "harmed", "mixed", "can't tell"
PRICE = "The price: the tuned model is farther from the base model (kl)."


LITTLE = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum", "f1"), 0.2),
    "exact_match": 0.1,
    "chrf": 25.0,
    "bleu": 5.0,
}
"""Scores of answers below which they have little in common with their references: mostly nonsense, read by people."""
SMALL_GAIN = 0.02
"""A gain of less than this share of the base's score is called small."""
MUCH_OVERLAP = 0.1
"""From this share of test rows on that stand in training, a gain may be memory."""
GONE = 0.01
"""Share of the first loss below which there is nothing left to learn."""
FALLING = {"validation_loss": 0.02, "loss": 0.05}
"""By how much a loss must fall at the end: from one validation to the next, or from the third quarter to the last."""


def verdict(
    evaluation: Evaluation | None, seeds: Seeds | None = None, curve: Sequence[Mapping[str, object]] = ()
) -> Verdict:
    """Return one word (helped, harmed, mixed, can't tell) and the reason, one sentence or a few.

    It is given by the metrics that speak. Where answers were also compared by likelihood (`choice_accuracy`) and that
    did not move, a gain elsewhere may be answer format alone, and the verdict is `can't tell`. A cost (`kl`) is
    named and decides nothing. Where a trivial baseline stands for the base model, the reason names it. A gain is no
    help yet (mixed) where answers still have little in common with their references, or where many test rows stand in
    training. Of the `curve` of training, a loss that was still falling at its end is named.
    """
    if evaluation is None or not evaluation.difference:
        measured = evaluation is not None and evaluation.tuned
        alone = "Only the tuned model has scores: there is nothing to compare them with."
        return Verdict(UNKNOWN, alone if measured else "Nothing was measured on held-out rows.")
    changes = countable(evaluation.difference)
    if not changes:
        rows = max(change.n for change in evaluation.difference.values())
        return Verdict(UNKNOWN, f"{rows} held-out rows are too few; at least {FEWEST_ROWS} are needed.")
    found = weigh(changes, evaluation.baseline)
    paid = "kl" in changes and direction("kl", changes["kl"]) < 0
    gained = [metric for metric, sign in speaking(changes).items() if sign > 0]
    doubts = list_doubts(evaluation) if found.word == HELPED else []
    small = small_gain(evaluation, gained) if found.word == HELPED else ""
    falling = "The loss was still falling when training ended: more epochs may help." if still_falling(curve) else ""
    parts = [found.reason, *doubts, small, warn_of_spread(seeds, gained), PRICE if paid else "", falling]
    return Verdict(MIXED if doubts else found.word, " ".join(part for part in parts if part))


def list_doubts(evaluation: Evaluation) -> list[str]:
    """Return what speaks against using a model whose scores rose."""
    doubts = []
    scores = {name: score for name, score in evaluation.tuned.items() if name in LITTLE and not missing(score)}
    if scores and all(score < LITTLE[name] for name, score in scores.items()):
        listing = ", ".join(f"{name} {score:.3g}" for name, score in scores.items())
        doubts.append(
            f"But answers still have little in common with their references ({listing}): read the samples, and train "
            "for longer or on more rows before you use it."
        )
    found = evaluation.contamination
    if found is not None and found.rows and found.overlapping >= MUCH_OVERLAP * found.rows:
        share = found.overlapping / found.rows
        doubts.append(f"But {share:.0%} of the test rows overlap with training rows: the gain may be memory.")
    return doubts


def small_gain(evaluation: Evaluation, gained: Sequence[str]) -> str:
    """Return a sentence where every score that rose did so by little."""
    base = evaluation.base or {}
    shares = [
        abs(evaluation.difference[name].value) / abs(base[name])
        for name in gained
        if name in base and base[name] and not missing(base[name])
    ]
    small = bool(shares) and max(shares) < SMALL_GAIN
    return f"The gain is small: {max(shares):.1%} of the base's scores at most." if small else ""


def still_falling(curve: Sequence[Mapping[str, object]]) -> bool:
    """Whether the loss fell to the end: the validation's where there are two, else that of training.

    One that is nearly gone, against what it was at first, has no way to fall.
    """
    validations, losses = (
        [float(value) for line in curve if isinstance(value := line.get(name), float | int)] for name in FALLING
    )
    if losses and (validations or losses)[-1] < GONE * losses[0]:
        return False
    if len(validations) > 1:
        before, last = validations[-2:]
        return last <= min(validations) and last < before * (1 - FALLING["validation_loss"])
    quarter = len(losses) // 4
    if quarter < 2:
        return False
    return fmean(losses[-quarter:]) < fmean(losses[-2 * quarter : -quarter]) * (1 - FALLING["loss"])


def countable(differences: Differences) -> dict[str, Difference]:
    """Return the differences that enough rows were measured for."""
    return {metric: change for metric, change in differences.items() if change.n >= FEWEST_ROWS}


def speaking(differences: Differences) -> dict[str, int]:
    """Return the metrics that changed beyond chance: 1 for the better, -1 for the worse.

    The 95 % interval leaves zero out, at least ten rows were measured, and p holds for all metrics together, so that
    only one in twenty evaluations without any change is said to have one, however many metrics it looks at: Holm, "A
    Simple Sequentially Rejective Multiple Test Procedure", 1979. Metrics that say the same in other units count once.
    Costs (`kl`, `answers_cut`) and what has no better side do not speak.
    """
    changes = countable(differences)
    signs = {metric: direction(metric, change) for metric, change in changes.items() if metric not in COSTS}
    signs = {metric: sign for metric, sign in signs.items() if better_side(metric)}
    counted = distinct(list(signs), changes)
    held = holm({metric: 1.0 if missing(p := changes[metric].p) else p for metric in counted})
    groups = (*SAME_FINDING, TWINS)
    held |= {
        metric for metric in signs.keys() - counted if any(metric in group and held & {*group} for group in groups)
    }
    return {metric: sign for metric, sign in signs.items() if sign and metric in held}


def weigh(changes: Differences, baseline: str | None) -> Verdict:
    """Return word and reason by those metrics that are no cost."""
    signs = speaking(changes)
    better = distinct([metric for metric, sign in signs.items() if sign > 0], changes, ALIKE)
    worse = distinct([metric for metric, sign in signs.items() if sign < 0], changes, ALIKE)
    than = f" than {baseline}" if baseline else ""
    if better and worse:
        reason = f"Better in {join_names(better)}{than}, worse in {join_names(worse)}."
        return Verdict(MIXED, f"{reason} Read the samples before you decide.")
    if worse:
        return Verdict(HARMED, f"Worse in {join_names(worse)}{than}, and better in nothing that was measured.")
    if not better:
        moved = f"No score is better or worse{than} beyond chance"
        moved_alone = [metric for metric in changes.keys() - COSTS if direction(metric, changes[metric])]
        if moved_alone:
            moved += f" (the interval of {join_names(sorted(moved_alone))} leaves zero out, as one of many metrics may)"
        return Verdict(UNKNOWN, f"{moved}: more held-out rows, or more training, would tell.")
    if CHOICE in changes and CHOICE not in better:
        reason = f"Better in {join_names(better)}, but choosing among the possible answers did not change beyond chance"
        return Verdict(UNKNOWN, f"{reason}: what was learned may be the format of answers alone.")
    return Verdict(HELPED, f"Better in {join_names(better)}{than}, and worse in nothing that was measured.")


def holm(ps: Mapping[str, float]) -> set[str]:
    """Return those whose p holds at 5 % for all of them together."""
    held = set[str]()
    for place, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        if p > CHANCE / (len(ps) - place):
            break
        held.add(name)
    return held


def distinct(metrics: list[str], changes: Differences, groups: Sequence[tuple[str, ...]] = SAME_FINDING) -> list[str]:
    """Keep one of the metrics that say the same in other units or under another name."""
    left_out = {metric for group in groups for metric in [one for one in group if one in metrics][1:]}
    if all(metric in metrics for metric in TWINS):
        first, second = (changes[metric].value for metric in TWINS)
        if abs(first - second) < 1e-9:  # rounding of two ways to the same
            left_out.add(TWINS[1])
    return [metric for metric in metrics if metric not in left_out]
