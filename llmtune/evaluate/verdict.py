"""The verdict: whether the tuned model is better than the champion, or else the base, also over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from llmtune.display.number_format import join_names, missing, score, signed
from llmtune.evaluate.class_sentences import class_reasons
from llmtune.evaluate.control_run_verdict import explain_gain
from llmtune.evaluate.control_verdict import weigh_controls
from llmtune.evaluate.metric_info import CHOICE, COSTS, better_side, direction, list_sides, rank_metrics
from llmtune.evaluate.seed_spread import warn_of_spread
from llmtune.evaluate.significance import (
    CHANCE,
    INCONCLUSIVE,
    Differences,
    MetricChanges,
    countable,
    find_changes,
    speaking,
)
from llmtune.recipe.gate_grammar import NEW, Opponent, parse_gate
from llmtune.records import FEWEST_ROWS, Difference
from llmtune.store.report_record import (
    Seeds,
    Verdict,
)
from llmtune.store.score_records import Champion, Evaluation, GateResult, NewRows, SimpleBaseline

BETTER, WORSE, MIXED, WITHIN = "better", "worse", "mixed", "within margin"
"""The words of every verdict, with `INCONCLUSIVE`: on a run, on a pair of runs."""
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
    result = judge_scores(evaluation, seeds, curve, gates, chance)
    if not doubts:
        return result
    new = evaluation.champion.new if evaluation and evaluation.champion else None
    word = INCONCLUSIVE if result.word in (BETTER, WITHIN) else result.word
    word = WORSE if result.word != BETTER and new and worse_on_new(new, chance) else word
    parts = [result.reason, *doubts] if word == result.word else [*doubts, result.reason]
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
    result = weigh(findings, changes, evaluation.baseline)
    unchosen = CHOICE in changes and CHOICE not in (*findings.better, *findings.within)
    if result.word == BETTER and unchosen and evaluation.tuned.get(CHOICE, 0.0) < 1:  # at 1 no answer is left to learn
        reason = f"Better in {join_names(findings.better)}, but choice accuracy shows no clear change: "
        reason += "the model may have learned only the format of answers."
        result = Verdict(INCONCLUSIVE, reason)
    paid = "kl" in changes and direction("kl", changes["kl"]) < 0
    doubts = list_doubts(evaluation) if result.word == BETTER else []
    small = small_gain(evaluation, findings.better) if result.word == BETTER else ""
    falling = "The loss was still falling when training ended: more epochs may help." if still_falling(curve) else ""
    spread = warn_of_spread(seeds, findings.better)
    parts = [result.reason, *doubts, small, spread, PRICE if paid else "", falling, name_guessable(evaluation)]
    return Verdict(INCONCLUSIVE if doubts else result.word, " ".join(part for part in parts if part))


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
    champion_gates = [gate for gate in gates if parse_gate(gate.name).against == "champion"]
    result = weigh(findings, champion.difference, "the champion")
    word, reason = result.word, result.reason
    if findings.failed:
        word = WORSE
    elif word in (BETTER, WITHIN) and (left := [gate.name for gate in champion_gates if not gate.passed]):
        word, reason = INCONCLUSIVE, f"{reason} But not every gate passed: {', '.join(left)}."
    if (changes := champion.classes) is not None:  # gains on new classes must not hide a loss
        signs = speaking(changes.known.difference, chance, sides) if changes.known else {}
        worse = [metric for metric, sign in signs.items() if sign < 0]
        unlearned = any(one.verdict == "not learned" for one in changes.new)
        if (worse or unlearned) and word in (BETTER, WITHIN):
            word = MIXED
        word = WORSE if worse and word == INCONCLUSIVE else word
        reason = " ".join([reason, *class_reasons(changes, [name for name in worse if name not in findings.worse])])
    result = Verdict(word, f"{reason} Compared on {champion.rows} test rows." if champion.rows else reason)
    return result if champion.new is None else judge_new(result, champion.new, gates, chance)


def judge_new(result: Verdict, new: NewRows, gates: Sequence[GateResult], chance: float) -> Verdict:
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
    word = result.word
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
    return Verdict(word, " ".join([result.reason, *parts] if word == result.word else [*parts, result.reason]))


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
    overlap = evaluation.contamination
    if overlap is not None and overlap.rows and overlap.overlapping >= MUCH_OVERLAP * overlap.rows:
        share = overlap.overlapping / overlap.rows
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
    verb, side = "is" if len(findings.contrary) == 1 else "are", WORSE if better else BETTER
    other = f"{join_names(findings.contrary)} {verb} {side}, but not clearly." if findings.contrary else ""
    if worse and (better or within):
        gained = f"Better in {join_names(better)}{than}, worse in {join_names(worse)}." if better else ""
        reason = gained or f"Worse in {join_names(worse)}{than}."
        return Verdict(
            MIXED,
            " ".join(part for part in (reason, margin, findings.bar, "Read the samples before you decide.") if part),
        )
    if worse:
        return Verdict(WORSE, f"Worse in {join_names(worse)}{than}; {other or 'no metric got better.'}{bar}")
    if better:
        rest = f"; {other} {margin}".rstrip() if other else f". {margin or 'No metric got worse.'}"
        return Verdict(BETTER, f"Better in {join_names(better)}{than}{rest}{bar}")
    if within:
        return Verdict(WITHIN, f"{margin}{bar}")
    costs = any(direction(metric, changes[metric]) for metric in changes.keys() & COSTS)
    what = "No metric of quality" if costs else "No metric"
    moved = f"{what} shows a clear difference{f' from {opponent}' if opponent else ''}."
    same = all(change.value == 0 for change in changes.values())
    rest = "Train longer, or on more rows." if same else "Use more held-out rows, or train longer."
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


def is_base(simple: SimpleBaseline, evaluation: Evaluation) -> bool:
    """Whether the baseline replaces the base model: its scores are shown already."""
    return bool(evaluation.baseline) and all(evaluation.base.get(name) == one for name, one in simple.scores.items())


def find_unbeaten(evaluation: Evaluation | None) -> list[tuple[int, SimpleBaseline, str]]:
    """Return the simple baselines that the tuned model is not shown to beat, with side and metric, the best first.

    The side is -1 if the baseline is better, else 0. The most informative metric decides. Without baselines that are
    beaten, or cannot be compared.
    """
    unbeaten = []
    for simple in evaluation.simple_baselines.values() if evaluation else ():
        ranked = (name for name in rank_metrics(simple.difference) if better_side(name) and name not in COSTS)
        metric = None if evaluation is None or is_base(simple, evaluation) else next(ranked, None)
        if metric is None or (change := simple.difference[metric]).n < FEWEST_ROWS:
            continue
        if (side := direction(metric, change)) <= 0:
            unbeaten.append((side, simple, metric))
    return sorted(unbeaten, key=lambda one: (one[0], better_side(one[2]) * one[1].difference[one[2]].value))


def simple_title(word: str, evaluation: Evaluation) -> tuple[str, str] | None:
    """Return the word and the opponent for the title of a verdict that `weigh_simple_baselines` changed; else None."""
    unbeaten = find_unbeaten(evaluation)
    if not unbeaten or not evaluation.baseline or evaluation.champion is not None:
        return None
    side, simple, _ = unbeaten[0]
    shown = {(INCONCLUSIVE, 0): INCONCLUSIVE, (MIXED, -1): WORSE}.get((word, side))
    return (shown, simple.title) if shown else None


def weigh_simple_baselines(result: Verdict, evaluation: Evaluation | None) -> Verdict:
    """Add a sentence to the verdict for each simple baseline that the tuned model is not shown to beat.

    `better` than a trivial baseline then becomes `mixed` if the tuned model is shown to be worse than a simple one,
    else `inconclusive`.
    """
    unbeaten = find_unbeaten(evaluation)
    if evaluation is None or not unbeaten:
        return result
    reason, word = result.reason, result.word
    for side, simple, metric in unbeaten:
        change = simple.difference[metric]
        ends = "" if missing(change.low) else f" ({signed(change.low)} to {signed(change.high)})"
        how = "Worse" if side else "Not better" if better_side(metric) * change.value <= 0 else "Not clearly better"
        numbers = f"{score(simple.tuned[metric])} against {score(simple.scores[metric])}{ends}"
        reason += f" {how} than {simple.title}: {metric.replace('_', ' ')} {numbers}."
    if word == BETTER and evaluation.baseline and evaluation.champion is None:
        word = MIXED if unbeaten[0][0] else INCONCLUSIVE
    return Verdict(word, reason)


def judge_run(
    evaluation: Evaluation | None,
    gates: Sequence[GateResult],
    alpha: float,
    seeds: Seeds | None = None,
    curve: Sequence[Mapping[str, object]] = (),
    doubts: Sequence[str] = (),
) -> Verdict:
    """Return the verdict on a run; champion differences get the gates' intervals, with error `alpha`.

    `doubts` are those of `list_label_doubts`.
    """
    champion = evaluation.champion if evaluation else None
    if evaluation is not None and champion is not None:
        changes = champion.classes
        if changes is not None and changes.known is not None:
            class_slice = replace(changes.known, difference=widen_all(changes.known.difference, alpha))
            changes = replace(changes, known=class_slice)
        widened = replace(champion, difference=widen_all(champion.difference, alpha), classes=changes)
        evaluation = replace(evaluation, champion=widened)
    result = weigh_simple_baselines(verdict(evaluation, seeds, curve, gates, alpha, doubts), evaluation)
    chance = alpha if champion else CHANCE
    result = weigh_controls(result, evaluation, list_gained(result.word, evaluation, gates, chance))
    studies = evaluation.studies.values() if evaluation else ()
    added = [*(study.verdict for study in studies if study.verdict), *explain_gain(evaluation, gates)]
    in_doubt = any(study.doubtful for study in studies) and result.word in (BETTER, WITHIN)
    return Verdict(INCONCLUSIVE if in_doubt else result.word, " ".join([result.reason, *added]))


def list_gained(
    word: str, evaluation: Evaluation | None, gates: Sequence[GateResult], chance: float = CHANCE
) -> list[str]:
    """Return the metrics in which a model with the verdict `better` is better than its opponent."""
    if evaluation is None or word != BETTER:
        return []
    opponent: Opponent = "champion" if evaluation.champion else "base"
    return find_changes(countable(judged_differences(evaluation)), gates, opponent, chance).better


def widen_all(differences: Differences, alpha: float) -> dict[str, Difference]:
    """Return the differences with intervals at error `alpha`."""
    from llmtune.evaluate.paired_statistics import widen  # late: pages of reports need no numpy

    return {metric: widen(change, alpha) for metric, change in differences.items()}
