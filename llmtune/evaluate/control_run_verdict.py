"""Whether the tuned model beat its control run, and how far it came towards its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmtune.display.number_format import join_names, missing, score, signed
from llmtune.evaluate.metric_info import COSTS, better_side, list_sides, rank_metrics
from llmtune.evaluate.significance import INCONCLUSIVE, find_changes
from llmtune.recipe.gate_grammar import Opponent
from llmtune.store.control_scores import ControlScores, TeacherScores
from llmtune.store.score_records import Evaluation, GateResult

YES, NO, UNKNOWN = "yes", "no", "unknown"
"""Whether the control run is beaten, with `INCONCLUSIVE`."""


def judge_control_run(control: ControlScores, gates: Sequence[GateResult] = ()) -> tuple[str, str]:
    """Return whether the tuned model beat the control run, and the sentence for the verdict.

    `yes` if it is better in a metric and worse in none, `no` if it is worse in a metric and better in none, as
    `find_changes` groups the metrics.
    """
    claim = f"{control.claim[0].upper()}{control.claim[1:]}"
    if control.why_none:
        return UNKNOWN, f"{claim}: unknown, because {control.why_none}."
    against: Opponent = control.name  # type: ignore[assignment]
    sides = list_sides(control.scores, control.tuned)
    changes = find_changes(control.difference, gates, against, sides=sides)
    parts = [
        f"{word} in {describe_changes(names, control)}"
        for word, names in (("better", changes.better), ("worse", changes.worse))
        if names
    ]
    if not parts:
        ranked = rank_metrics(control.difference)
        metric = next((name for name in ranked if better_side(name) and name not in COSTS), None)
        shown = f": {describe_changes([metric], control)}" if metric else ""
        return INCONCLUSIVE, f"{claim}: {INCONCLUSIVE}, no metric shows a clear difference{shown}."
    word = INCONCLUSIVE if len(parts) == 2 else YES if changes.better else NO
    return word, f"{claim}: {word}, {' and '.join(parts)}."


def describe_changes(metrics: Sequence[str], control: ControlScores) -> str:
    """Return the metrics, with the scores and the interval of the most informative one."""
    first = rank_metrics(metrics)[0]
    change = control.difference[first]
    ends = "" if missing(change.low) else f", difference {signed(change.low)} to {signed(change.high)}"
    values = f"{score(control.tuned[first])} against {score(control.scores[first])}{ends}"
    others = [name for name in metrics if name != first]
    rest = f" and in {join_names(others)}" if others else ""
    return f"{first.replace('_', ' ')} ({values}){rest}"


def describe_teacher(teacher: TeacherScores) -> str:
    """Return a sentence on the share of the gap to the teacher that was closed in the most informative metric."""
    metric = next(iter(rank_metrics(teacher.shares)), None)
    if metric is None:
        return "No share of a gap: the teacher is not clearly better than the base on these rows."
    change = teacher.shares[metric]
    ends = "" if missing(change.low) else f" ({change.low:.0%} to {change.high:.0%})"
    return f"It closed {change.value:.0%}{ends} of the gap to the teacher in {metric.replace('_', ' ')}."


def explain_gain(evaluation: Evaluation | None, gates: Sequence[GateResult]) -> list[str]:
    """Return the sentences of the verdict on control run and teacher."""
    control, teacher = (evaluation.control_run, evaluation.teacher) if evaluation else (None, None)
    sentences = [judge_control_run(control, gates)[1]] if control else []
    return [*sentences, *([describe_teacher(teacher)] if teacher else [])]


def count_beaten(evaluations: Iterable[Evaluation]) -> str:
    """Return a sentence on the seeds whose model beat its own control run; empty without control runs."""
    controls = [one.control_run for one in evaluations if one.control_run and not one.control_run.why_none]
    if not controls:
        return ""
    words = [judge_control_run(one)[0] for one in controls]
    counts = ", ".join(f"{word} {words.count(word)}" for word in (YES, NO, INCONCLUSIVE))
    return f"Over {len(words)} seeds, each with its own control run, {controls[0].claim}: {counts}."
