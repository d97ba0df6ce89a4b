"""The verdict: whether the tuned model is better than the champion, or else the base, also over several seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from llmtune.recipe.gate_grammar import Opponent, parse_gate
from llmtune.report.class_sentences import class_reasons
from llmtune.report.metric_info import CHOICE, COSTS, better_side, direction
from llmtune.report.number_format import missing
from llmtune.report.report_record import SeedRun, Seeds, Spread, Verdict
from llmtune.score_records import Champion, Difference, Evaluation, GateResult


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


def join_names(metrics: Sequence[str]) -> str:
    """Join metric names with commas and `and`, without underscores."""
    words = [metric.replace("_", " ") for metric in metrics]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


SAME_FINDING = (("loss", "bits_per_byte", "perplexity"),)
"""Metrics that are one number in several units."""
ALIKE = (*SAME_FINDING, ("wer", "cer"))
"""Metrics that show the same finding; the verdict names only the first."""
CHANCE = 0.05
TWINS = ("accuracy", "f1_micro")
"""Two names of one number if each row has one label; only then both changes are equal."""
FEWEST_ROWS = 10
Differences = Mapping[str, Difference]
BETTER, WORSE, MIXED, WITHIN, INCONCLUSIVE = "better", "worse", "mixed", "within margin", "inconclusive"
"""The words of every verdict: on a run, on a pair of runs, on a sweep. Gates use the last one too."""
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


@dataclass(frozen=True)
class MetricChanges:
    """Metrics, grouped by what their differences show."""

    better: list[str]
    worse: list[str]
    within: list[str]
    """Not better, and within the margin of a passed gate."""
    tolerated: list[str]
    """The metrics of `within` that are worse."""
    failed: list[str]
    """Worse, with a gate that did not pass."""


def verdict(
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
        return judge_challenger(evaluation.champion, gates, chance)
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
    findings = find_changes(changes, gates, "base")
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


def judge_challenger(champion: Champion, gates: Sequence[GateResult], chance: float) -> Verdict:
    """Return the verdict on a tuned model against a champion; it never contradicts a gate on the champion.

    A worse metric fails its gate or is within its margin. If such a gate failed, the verdict is `worse`, whatever else
    got better. If another gate on the champion did not pass, the verdict is not `better`.
    """
    if not champion.difference:
        return Verdict(INCONCLUSIVE, "No metric could be compared with the champion.")
    findings = find_changes(champion.difference, gates, "champion", chance)
    own = [gate for gate in gates if parse_gate(gate.name).against == "champion"]
    found = weigh(findings, champion.difference, "the champion")
    word, reason = found.word, found.reason
    if findings.failed:
        word = WORSE
    elif word in (BETTER, WITHIN) and (left := [gate.name for gate in own if not gate.passed]):
        word, reason = INCONCLUSIVE, f"{reason} But not every gate passed: {', '.join(left)}."
    if (changes := champion.classes) is not None:  # gains on new classes must not hide a loss
        signs = speaking(changes.known.difference, chance) if changes.known else {}
        worse = [metric for metric, sign in signs.items() if sign < 0]
        unlearned = any(one.verdict == "not learned" for one in changes.new)
        if (worse or unlearned) and word in (BETTER, WITHIN):
            word = MIXED
        word = WORSE if worse and word == INCONCLUSIVE else word
        reason = " ".join([reason, *class_reasons(changes, [name for name in worse if name not in findings.worse])])
    return Verdict(word, f"{reason} Compared on {champion.rows} test rows." if champion.rows else reason)


def is_open(gate: GateResult) -> bool:
    """Return whether a gate is inconclusive, whatever `evaluate.when_unsure` makes of it."""
    return gate.passed is None or gate.note.startswith(INCONCLUSIVE)


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


def countable(differences: Differences) -> dict[str, Difference]:
    """Return the differences with enough rows."""
    return {metric: change for metric, change in differences.items() if change.n >= FEWEST_ROWS}


def find_changes(
    differences: Differences, gates: Sequence[GateResult], against: Opponent, chance: float = CHANCE
) -> MetricChanges:
    """Group the metrics by the differences from one opponent.

    A metric with a gate on its interval was chosen in advance, so only its interval decides, as in the gate. All other
    metrics share the error rate (`speaking`).
    """
    gated = defaultdict[str, list[GateResult]](list)
    for result in gates:
        gate = parse_gate(result.name)
        if gate.part and gate.against == against and gate.metric in differences:
            gated[gate.metric].append(result)
    signs = speaking({metric: change for metric, change in differences.items() if metric not in gated}, chance)
    signs |= {metric: direction(metric, differences[metric]) for metric in gated}
    passed = [name for name, results in gated.items() if all(one.passed and not is_open(one) for one in results)]
    within = [name for name in passed if signs[name] <= 0 and any(bounds_loss(one) for one in gated[name])]
    better, worse = ([name for name in differences if signs.get(name) == sign] for sign in (1, -1))
    return MetricChanges(
        better=distinct(better, differences, ALIKE),
        worse=distinct([name for name in worse if name not in within], differences, ALIKE),
        within=within,
        tolerated=[name for name in within if signs[name] < 0],
        failed=[name for name in gated if signs[name] < 0 and name not in passed],
    )


def bounds_loss(result: GateResult) -> bool:
    """Whether a gate is on the interval's worse end: the better end never shows that a model is not worse."""
    gate = parse_gate(result.name)
    return gate.part == ("low" if gate.op in (">", ">=") else "high")


def speaking(differences: Differences, chance: float = CHANCE) -> dict[str, int]:
    """Return the metrics with a significant change: 1 for better, -1 for worse.

    The interval must exclude zero, at least ten rows must be measured, and p must be significant after correction for
    all metrics. At most one in twenty evaluations without any change then reports one, however many metrics. Source:
    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979. Metrics that are one number in several units
    count once. Costs (`kl`, `answers_cut`) and metrics without a better direction do not count.
    """
    changes = countable(differences)
    signs = {metric: direction(metric, change) for metric, change in changes.items() if metric not in COSTS}
    signs = {metric: sign for metric, sign in signs.items() if better_side(metric)}
    counted = distinct(list(signs), changes)
    held = holm({metric: 1.0 if missing(p := changes[metric].p) else p for metric in counted}, chance)
    groups = (*SAME_FINDING, TWINS)
    held |= {
        metric for metric in signs.keys() - counted if any(metric in group and held & {*group} for group in groups)
    }
    return {metric: sign for metric, sign in signs.items() if sign and metric in held}


def weigh(findings: MetricChanges, changes: Differences, opponent: str | None) -> Verdict:
    """Return word and reason; pass `opponent` to name an opponent other than the base model."""
    better, worse, within = findings.better, findings.worse, findings.within
    than = f" than {opponent}" if opponent else ""
    margin = name_within(findings)
    if worse and (better or within):
        gained = f"Better in {join_names(better)}{than}, worse in {join_names(worse)}." if better else ""
        reason = gained or f"Worse in {join_names(worse)}{than}."
        return Verdict(
            MIXED, " ".join(part for part in (reason, margin, "Read the samples before you decide.") if part)
        )
    if worse:
        return Verdict(WORSE, f"Worse in {join_names(worse)}{than}; no metric got better.")
    if better:
        rest = margin or "No metric got worse."
        return Verdict(BETTER, f"Better in {join_names(better)}{than}. {rest}")
    if within:
        return Verdict(WITHIN, margin)
    costs = any(direction(metric, changes[metric]) for metric in changes.keys() & COSTS)
    what = "No metric of quality" if costs else "No metric"
    moved = f"{what} shows a clear difference{f' from {opponent}' if opponent else ''}"
    moved_alone = [metric for metric in changes.keys() - COSTS if direction(metric, changes[metric])]
    if moved_alone:
        moved += f" (the interval of {join_names(sorted(moved_alone))} excludes zero, but one in twenty intervals does "
        moved += "so by chance)"
    return Verdict(INCONCLUSIVE, f"{moved}. Use more held-out rows, or train longer.")


def name_within(findings: MetricChanges) -> str:
    """Return a sentence on the metrics within the margins of their gates, or an empty string."""
    parts = []
    if level := [name for name in findings.within if name not in findings.tolerated]:
        parts.append(f"{join_names(level)} {'is' if len(level) == 1 else 'are'} within the margin of the gate")
    if lost := findings.tolerated:
        parts.append(f"{join_names(lost)} {'is' if len(lost) == 1 else 'are'} worse, but within the margin of the gate")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def holm(ps: Mapping[str, float], chance: float = CHANCE) -> set[str]:
    """Return the names with significant p at the family-wise error `chance` (Holm's procedure)."""
    held = set[str]()
    for place, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        if p > chance / (len(ps) - place):
            break
        held.add(name)
    return held


def distinct(metrics: list[str], changes: Differences, groups: Sequence[tuple[str, ...]] = SAME_FINDING) -> list[str]:
    """Keep only the first of the metrics that are the same number in other units or under another name."""
    left_out = {metric for group in groups for metric in [one for one in group if one in metrics][1:]}
    if all(metric in metrics for metric in TWINS):
        first, second = (changes[metric].value for metric in TWINS)
        if abs(first - second) < 1e-9:  # the same number up to rounding
            left_out.add(TWINS[1])
    return [metric for metric in metrics if metric not in left_out]
