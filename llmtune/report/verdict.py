"""The verdict: is the tuned model better than the champion or, without one, than the base; and over several seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from llmtune.recipe.gate_grammar import Opponent, parse_gate
from llmtune.records import Champion, Difference, Evaluation, GateResult
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

    A second sentence names seeds without scores.
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
BETTER, WORSE, MIXED, WITHIN, INCONCLUSIVE = "better", "worse", "mixed", "within margin", "inconclusive"
"""The words of every verdict: on a run, on a pair of runs, on a sweep. Gates use the last one too."""
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
"""If this share of the test rows is also in training, a gain may be memory."""
GONE = 0.01
"""Share of the first loss below which there is nothing left to learn."""
FALLING = {"validation_loss": 0.02, "loss": 0.05}
"""By how much a loss must fall at the end: from one validation to the next, or from the third quarter to the last."""


@dataclass(frozen=True)
class MetricChanges:
    """What the differences show, metric by metric."""

    better: list[str]
    worse: list[str]
    within: list[str]
    """Neither, and shown by a gate to be within its margin."""
    tolerated: list[str]
    """Those of `within` that are shown to be worse."""
    failed: list[str]
    """Shown to be worse, and a gate is on them that did not pass."""


def verdict(
    evaluation: Evaluation | None,
    seeds: Seeds | None = None,
    curve: Sequence[Mapping[str, object]] = (),
    gates: Sequence[GateResult] = (),
    chance: float = CHANCE,
) -> Verdict:
    """Return one word and the reason, one sentence or a few: about the champion if there is one, else about the base.

    `find_changes` says which metrics decide. Of the base: where answers were also compared by likelihood
    (`choice_accuracy`) and that did not move, a gain elsewhere may be answer format alone, and the verdict is
    inconclusive. So is a gain where answers still have little in common with their references, or where many test rows
    are in training. A cost (`kl`) is named and decides nothing. Where a trivial baseline replaces the base model, the
    reason names it. A training `curve` that was still falling at its end is named. Intervals and p-values of
    differences from the champion have the error `chance`.
    """
    if evaluation is not None and evaluation.champion is not None:
        return judge_challenger(evaluation.champion, gates, chance)
    if evaluation is None or not evaluation.difference:
        measured = evaluation is not None and evaluation.tuned
        alone = "Only the tuned model has scores: there is nothing to compare them with."
        return Verdict(INCONCLUSIVE, alone if measured else "Nothing was measured on held-out rows.")
    changes = countable(judged_differences(evaluation))
    if not changes and not countable(evaluation.difference):
        rows = max(change.n for change in evaluation.difference.values())
        return Verdict(INCONCLUSIVE, f"{rows} held-out rows are too few; at least {FEWEST_ROWS} are needed.")
    findings = find_changes(changes, gates, "base")
    found = weigh(findings, changes, evaluation.baseline)
    if found.word == BETTER and CHOICE in changes and CHOICE not in (*findings.better, *findings.within):
        reason = f"Better in {join_names(findings.better)}, but choosing among the possible answers did not change"
        reason += " beyond chance: what was learned may be the format of answers alone."
        found = Verdict(INCONCLUSIVE, reason)
    paid = "kl" in changes and direction("kl", changes["kl"]) < 0
    doubts = list_doubts(evaluation) if found.word == BETTER else []
    small = small_gain(evaluation, findings.better) if found.word == BETTER else ""
    falling = "The loss was still falling when training ended: more epochs may help." if still_falling(curve) else ""
    spread = warn_of_spread(seeds, findings.better)
    parts = [found.reason, *doubts, small, spread, PRICE if paid else "", falling, name_guessable(evaluation)]
    return Verdict(INCONCLUSIVE if doubts else found.word, " ".join(part for part in parts if part))


def judge_challenger(champion: Champion, gates: Sequence[GateResult], chance: float) -> Verdict:
    """Return the verdict on a tuned model that has a champion; it never contradicts a gate on the champion.

    A metric that is worse fails its gate or is within its margin. Where a gate failed for that, the word is `worse`,
    whatever else got better; where another gate on the champion did not pass, it is not `better`.
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
    return Verdict(word, f"{reason} Compared on {champion.rows} test rows." if champion.rows else reason)


def is_open(gate: GateResult) -> bool:
    """Whether a gate is inconclusive, whatever that counts as."""
    return gate.passed is None or gate.note.startswith(INCONCLUSIVE)


def judged_differences(evaluation: Evaluation) -> Mapping[str, Difference]:
    """Return the differences that the verdict is about; none that guessing by class frequency would win too."""
    if evaluation.champion is not None:
        return evaluation.champion.difference
    return {name: change for name, change in evaluation.difference.items() if name not in evaluation.guessable}


def name_guessable(evaluation: Evaluation) -> str:
    """Return a sentence on the metrics that the verdict cannot use, or an empty text."""
    names = [name for name in evaluation.guessable if name in evaluation.difference]
    verb = "does" if len(names) == 1 else "do"
    why = "guessing by class frequency beats the most frequent class there too"
    return f"{join_names(names).capitalize()} {verb} not count: {why}." if names else ""


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


def find_changes(
    differences: Differences, gates: Sequence[GateResult], against: Opponent, chance: float = CHANCE
) -> MetricChanges:
    """Sort the metrics by what the differences from one opponent show.

    A metric with a gate on its interval was chosen beforehand, so its interval decides alone, as in the gate. All other
    metrics share the error (`speaking`).
    """
    gated = defaultdict[str, list[GateResult]](list)
    for result in gates:
        gate = parse_gate(result.name)
        if gate.part and gate.against == against and gate.metric in differences:
            gated[gate.metric].append(result)
    signs = speaking({metric: change for metric, change in differences.items() if metric not in gated}, chance)
    signs |= {metric: direction(metric, differences[metric]) for metric in gated}
    passed = [name for name, results in gated.items() if all(one.passed and not is_open(one) for one in results)]
    within = [name for name in passed if signs[name] <= 0]
    better, worse = ([name for name in differences if signs.get(name) == sign] for sign in (1, -1))
    return MetricChanges(
        better=distinct(better, differences, ALIKE),
        worse=distinct([name for name in worse if name not in within], differences, ALIKE),
        within=within,
        tolerated=[name for name in within if signs[name] < 0],
        failed=[name for name in gated if signs[name] < 0 and name not in passed],
    )


def speaking(differences: Differences, chance: float = CHANCE) -> dict[str, int]:
    """Return the metrics that changed beyond chance: 1 for the better, -1 for the worse.

    The interval excludes zero, at least ten rows were measured, and p holds for all metrics together. So only one in
    twenty evaluations without any change is said to have one, however many metrics it has: Holm, "A Simple Sequentially
    Rejective Multiple Test Procedure", 1979. Metrics that say the same in other units count once. Costs (`kl`,
    `answers_cut`) and metrics without a better side do not count.
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
    """Return word and reason; `opponent` is named where it is not the base model."""
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
    moved = f"No metric is better or worse{than} beyond chance"
    moved_alone = [metric for metric in changes.keys() - COSTS if direction(metric, changes[metric])]
    if moved_alone:
        moved += f" (the interval of {join_names(sorted(moved_alone))} excludes zero, as one of many metrics may)"
    return Verdict(INCONCLUSIVE, f"{moved}: more held-out rows, or more training, would tell.")


def name_within(findings: MetricChanges) -> str:
    """Return a sentence on the metrics that are within the margins of their gates, or an empty text."""
    parts = []
    if level := [name for name in findings.within if name not in findings.tolerated]:
        parts.append(f"{join_names(level)} {'is' if len(level) == 1 else 'are'} within the margin of the gate")
    if lost := findings.tolerated:
        parts.append(f"{join_names(lost)} {'is' if len(lost) == 1 else 'are'} worse, but within the margin of the gate")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def holm(ps: Mapping[str, float], chance: float = CHANCE) -> set[str]:
    """Return those whose p holds at the error `chance` for all of them together."""
    held = set[str]()
    for place, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        if p > chance / (len(ps) - place):
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
