"""The verdict: whether the tuned model is better than the champion, or else the base, also over several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from statistics import fmean

from llmtune.display.number_format import join_names, missing, score
from llmtune.evaluate.class_sentences import class_reasons
from llmtune.evaluate.metric_info import CHOICE, COSTS, better_side, direction, list_sides, rank_metrics
from llmtune.evaluate.significance import (
    CHANCE,
    INCONCLUSIVE,
    Differences,
    MetricChanges,
    countable,
    find_changes,
    speaking,
)
from llmtune.recipe.gate_grammar import NEW, parse_gate
from llmtune.records import FEWEST_ROWS, Difference
from llmtune.store.report_record import SeedRun, Seeds, Spread, Verdict
from llmtune.store.score_records import Champion, Evaluation, GateResult, NewRows


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
    """Return mean, deviation and range of the scores, and whether the gain over the base exceeds their range.

    Numbers are None for a single seed, without a base, or if a score is not finite.
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
    known = seeds.metrics if seeds else {}
    within = [metric for metric in metrics if metric in known and known[metric].larger is False]
    if not seeds or not within:
        return ""
    return (
        f"The gain may disappear with another seed: in {join_names(within)} the spread of {len(seeds.runs)} seeds is "
        "at least as large as the gain."
    )


BETTER, WORSE, MIXED, WITHIN = "better", "worse", "mixed", "within margin"
"""The words of every verdict, with `INCONCLUSIVE`: on a run, on a pair of runs, on a sweep."""
PRICE = "The cost: the tuned model is farther from the base model (kl)."


LITTLE = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum", "f1"), 0.2),
    "exact_match": 0.1,
    "chrf": 25.0,
    "bleu": 5.0,
}
"""Scores below which answers have little in common with their references and mostly read as nonsense."""
SMALL_GAIN = 0.02
"""The verdict calls a gain below this share of the base's score small."""
MUCH_OVERLAP = 0.1
"""Share of overlapping test rows from which a gain may be memorisation."""
GONE = 0.01
"""Share of the first loss below which nothing is left to learn."""
FALLING = {"validation_loss": 0.02, "loss": 0.05}
"""Relative fall that counts as still falling: between the last two validations, or the last two quarters."""


def verdict(
    evaluation: Evaluation | None,
    seeds: Seeds | None = None,
    curve: Sequence[Mapping[str, object]] = (),
    gates: Sequence[GateResult] = (),
    chance: float = CHANCE,
    doubts: Sequence[str] = (),
) -> Verdict:
    """Return the verdict as `judge_scores` does, unless the labels of a source file are in doubt.

    With such `doubts` a model is not `better` or within its margin. It is `worse` if it also is clearly worse on the
    rows that are new to the champion than on the others, unless it is better than the champion.
    """
    found = judge_scores(evaluation, seeds, curve, gates, chance)
    if not doubts:
        return found
    new = evaluation.champion.new if evaluation and evaluation.champion else None
    word = INCONCLUSIVE if found.word in (BETTER, WITHIN) else found.word
    word = WORSE if found.word != BETTER and new and worse_on_new(new, chance) else word
    parts = [found.reason, *doubts] if word == found.word else [*doubts, found.reason]
    return Verdict(word, " ".join(parts))


def judge_scores(
    evaluation: Evaluation | None,
    seeds: Seeds | None = None,
    curve: Sequence[Mapping[str, object]] = (),
    gates: Sequence[GateResult] = (),
    chance: float = CHANCE,
) -> Verdict:
    """Return the verdict on the tuned model against the champion, or against the base without a champion.

    `find_changes` decides the metrics. Against the base, a gain is inconclusive in three cases: `choice_accuracy` was
    measured and did not change, so the model may have learned only the answer format; answers still have little in
    common with their references; or many test rows overlap with training rows. The reason mentions a cost (`kl`), a
    trivial baseline, and a training `curve` that was still falling, but these do not change the verdict. Intervals and
    p-values of differences from the champion have the error `chance`.
    """
    if evaluation is not None and evaluation.champion is not None:
        sides = list_sides(evaluation.champion.scores, evaluation.champion.tuned, evaluation.decided)
        return judge_challenger(evaluation.champion, gates, chance, sides)
    if evaluation is None or not evaluation.difference:
        measured = evaluation is not None and evaluation.tuned
        alone = "Only the tuned model has scores, so nothing can be compared."
        return Verdict(INCONCLUSIVE, alone if measured else "Nothing was measured on held-out rows.")
    changes = countable(judged_differences(evaluation))
    if not changes and not countable(evaluation.difference):
        rows = max(change.n for change in evaluation.difference.values())
        return Verdict(
            INCONCLUSIVE, f"{rows} held-out row{'s are' if rows != 1 else ' is'} too few; use at least {FEWEST_ROWS}."
        )
    sides = {name: better_side(name) for name in changes} | list_sides(
        evaluation.base, evaluation.tuned, evaluation.decided
    )
    findings = find_changes(changes, gates, "base", sides=sides)
    found = weigh(findings, changes, evaluation.baseline)
    if found.word == BETTER and CHOICE in changes and CHOICE not in (*findings.better, *findings.within):
        reason = f"Better in {join_names(findings.better)}, but choice accuracy shows no clear change: "
        reason += "the model may have learned only the format of answers."
        found = Verdict(INCONCLUSIVE, reason)
    paid = "kl" in changes and direction("kl", changes["kl"]) < 0
    doubts = list_doubts(evaluation) if found.word == BETTER else []
    small = small_gain(evaluation, findings.better) if found.word == BETTER else ""
    falling = "The loss was still falling when training ended: more epochs may help." if still_falling(curve) else ""
    spread = warn_of_spread(seeds, findings.better)
    parts = [found.reason, *doubts, small, spread, PRICE if paid else "", falling, name_guessable(evaluation)]
    return Verdict(INCONCLUSIVE if doubts else found.word, " ".join(part for part in parts if part))


def judge_challenger(
    champion: Champion, gates: Sequence[GateResult], chance: float, sides: Mapping[str, int]
) -> Verdict:
    """Return the verdict on a tuned model against a champion; it never contradicts a gate on the champion.

    A worse metric fails its gate or is within its margin. If such a gate failed, the verdict is `worse`, whatever else
    got better. If another gate on the champion did not pass, the verdict is not `better`. `sides` are those of
    `list_sides`.
    """
    if not champion.difference:
        return Verdict(INCONCLUSIVE, "No metric could be compared with the champion.")
    sides = {name: sides.get(name, better_side(name)) for name in champion.difference}
    findings = find_changes(champion.difference, gates, "champion", chance, sides)
    own = [gate for gate in gates if parse_gate(gate.name).against == "champion"]
    found = weigh(findings, champion.difference, "the champion")
    word, reason = found.word, found.reason
    if findings.failed:
        word = WORSE
    elif word in (BETTER, WITHIN) and (left := [gate.name for gate in own if not gate.passed]):
        word, reason = INCONCLUSIVE, f"{reason} But not every gate passed: {', '.join(left)}."
    if (changes := champion.classes) is not None:  # gains on new classes must not hide a loss
        signs = speaking(changes.known.difference, chance, sides) if changes.known else {}
        worse = [metric for metric, sign in signs.items() if sign < 0]
        unlearned = any(one.verdict == "not learned" for one in changes.new)
        if (worse or unlearned) and word in (BETTER, WITHIN):
            word = MIXED
        word = WORSE if worse and word == INCONCLUSIVE else word
        reason = " ".join([reason, *class_reasons(changes, [name for name in worse if name not in findings.worse])])
    found = Verdict(word, f"{reason} Compared on {champion.rows} test rows." if champion.rows else reason)
    return found if champion.new is None else judge_new(found, champion.new, gates, chance)


def judge_new(found: Verdict, new: NewRows, gates: Sequence[GateResult], chance: float) -> Verdict:
    """Return the verdict with the rows that are new to the champion: a loss there is never outweighed by old rows.

    `worse` if the tuned model is clearly worse there than the champion, or misses a gate there and is clearly worse
    than on the other rows; `mixed` if it also is clearly better than the champion. Any other gate on new rows that did
    not pass prevents a good verdict.
    """
    findings = find_changes(new.difference, gates, "champion", chance, list_sides(new.before, new.tuned), NEW)
    lower = worse_on_new(new, chance)
    judged = [gate for gate in gates if parse_gate(gate.name).rows]
    failed = [gate.name for gate in judged if gate.passed is False]
    left = [gate.name for gate in judged if not gate.passed]
    word = found.word
    if findings.failed or (failed and lower) or findings.worse:
        word = MIXED if word == BETTER and not findings.failed else word if word in (MIXED, WORSE) else WORSE
    elif left and word in (BETTER, WITHIN):
        word = INCONCLUSIVE
    parts = []
    where = f"On {new.rows} test rows that are new to the champion"
    for side, names in (("worse", findings.worse), ("better", findings.better)):
        if names:
            values = f" ({score(new.tuned[names[0]])}, champion {score(new.before[names[0]])})"
            parts.append(f"{where}, it is {side} than the champion in {join_names(names)}{values}.")
    if lower:
        name, change = lower[0], new.from_old[lower[0]]
        there = new.scores.tuned[name]
        values = f"{join_names([name])} {score(there)} against {score(there - change.value)}"
        parts.append(f"On {new.scores.rows} new test rows it is clearly worse than on the others: {values}.")
    if left:
        parts.append(f"Not passed on new rows: {', '.join(left)}.")
    return Verdict(word, " ".join([found.reason, *parts] if word == found.word else [*parts, found.reason]))


def worse_on_new(new: NewRows, chance: float = CHANCE) -> list[str]:
    """Return the metrics in which the tuned model is clearly worse on new rows than on others, the clearest first."""
    names = [name for name, sign in speaking(new.from_old, chance).items() if sign < 0]
    return rank_metrics(names)


def judged_differences(evaluation: Evaluation) -> Mapping[str, Difference]:
    """Return the differences for the verdict, without metrics that guessing by class frequency improves too."""
    if evaluation.champion is not None:
        return evaluation.champion.difference
    return {name: change for name, change in evaluation.difference.items() if name not in evaluation.guessable}


def name_guessable(evaluation: Evaluation) -> str:
    """Return a sentence on the metrics that the verdict cannot use, or an empty string."""
    names = [name for name in evaluation.guessable if name in evaluation.difference]
    verb = "does" if len(names) == 1 else "do"
    why = "guessing by class frequency beats the most frequent class there too"
    return f"{join_names(names).capitalize()} {verb} not count: {why}." if names else ""


def list_doubts(evaluation: Evaluation) -> list[str]:
    """Return reasons for doubt about a model whose scores improved."""
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
        doubts.append(f"But {share:.0%} of the test rows overlap with training rows: the gain may be memorisation.")
    return doubts


def small_gain(evaluation: Evaluation, gained: Sequence[str]) -> str:
    """Return a sentence if every improved score improved only a little, else an empty string."""
    base = evaluation.base or {}
    shares = [
        abs(evaluation.difference[name].value) / abs(base[name])
        for name in gained
        if name in base and base[name] and not missing(base[name])
    ]
    small = bool(shares) and max(shares) < SMALL_GAIN
    return f"The gain is small: {max(shares):.1%} of the base's scores at most." if small else ""


def still_falling(curve: Sequence[Mapping[str, object]]) -> bool:
    """Return whether the loss was still falling: the validation loss if it has two values, else the training loss.

    A loss near zero, relative to the first loss, counts as not falling.
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


def weigh(findings: MetricChanges, changes: Differences, opponent: str | None) -> Verdict:
    """Return word and reason; pass `opponent` to name an opponent other than the base model."""
    better, worse, within = findings.better, findings.worse, findings.within
    than = f" than {opponent}" if opponent else ""
    margin, bar = name_within(findings), f" {findings.bar}" if findings.bar else ""
    if worse and (better or within):
        gained = f"Better in {join_names(better)}{than}, worse in {join_names(worse)}." if better else ""
        reason = gained or f"Worse in {join_names(worse)}{than}."
        return Verdict(
            MIXED,
            " ".join(part for part in (reason, margin, findings.bar, "Read the samples before you decide.") if part),
        )
    if worse:
        return Verdict(WORSE, f"Worse in {join_names(worse)}{than}; no metric got better.{bar}")
    if better:
        rest = margin or "No metric got worse."
        return Verdict(BETTER, f"Better in {join_names(better)}{than}. {rest}{bar}")
    if within:
        return Verdict(WITHIN, f"{margin}{bar}")
    costs = any(direction(metric, changes[metric]) for metric in changes.keys() & COSTS)
    what = "No metric of quality" if costs else "No metric"
    moved = f"{what} shows a clear difference{f' from {opponent}' if opponent else ''}."
    rest = "Use more held-out rows, or train longer."
    return Verdict(INCONCLUSIVE, " ".join(part for part in (moved, findings.bar, rest) if part))


def name_within(findings: MetricChanges) -> str:
    """Return a sentence on the metrics within the margins of their gates, or an empty string."""
    parts = []
    if level := [name for name in findings.within if name not in findings.tolerated]:
        parts.append(f"{join_names(level)} {'is' if len(level) == 1 else 'are'} within the margin of the gate")
    if lost := findings.tolerated:
        parts.append(f"{join_names(lost)} {'is' if len(lost) == 1 else 'are'} worse, but within the margin of the gate")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""
