"""Whether a tuned model's answers depend on the pictures of the test rows, and what that makes of a good verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmtune.display.number_format import join_names, missing, score, signed
from llmtune.evaluate.metric_info import COSTS, better_side, direction, rank_metrics
from llmtune.evaluate.significance import INCONCLUSIVE, countable
from llmtune.recipe.task_facts import CALIBRATION, CONTROLS, LANGUAGE
from llmtune.records import FEWEST_ROWS
from llmtune.store.report_record import Verdict
from llmtune.store.score_records import Control, Evaluation

LIKELIHOODS = frozenset({*LANGUAGE, *CALIBRATION})
"""Metrics of probabilities, which change with any input. They count only where no answer is measured."""
MOST = 0.5
"""Share of test rows with pictures from which a gain in all test rows is a gain in them."""


@dataclass(frozen=True)
class Reliance:
    """What the controls show."""

    lacking: tuple[str, ...]
    """Controls under which the tuned model is not shown to be worse than with the rows' own pictures."""
    sentence: str
    """Empty if its answers depend on the pictures."""


def find_reliance(evaluation: Evaluation | None) -> Reliance | None:
    """Return whether the tuned model's answers depend on the pictures; None without pictures, controls or enough rows.

    Metrics of answers decide, each by its 95 % interval; without any, those of probabilities.
    """
    controls = {name: one for name, one in evaluation.controls.items() if is_judged(one)} if evaluation else {}
    if not controls:
        return None
    lost = {name: [one for one in judged_metrics(controls[name]) if is_lost(one, name, controls)] for name in controls}
    lacking = tuple(name for name in controls if not lost[name])
    return Reliance(lacking, describe_reliance(controls, lacking))


def list_reliances(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Return a sentence for each run, by name, whose answers do not depend on the pictures."""
    reliances = {name: find_reliance(evaluation) for name, evaluation in evaluations.items()}
    return [f"{name}: {one.sentence}" for name, one in reliances.items() if one and one.sentence]


def is_judged(control: Control) -> bool:
    """Whether a control has a metric that can show a difference, on enough rows."""
    return any(control.difference[metric].n >= FEWEST_ROWS for metric in judged_metrics(control))


def judged_metrics(control: Control) -> list[str]:
    """Return the metrics that decide whether answers depend on the picture, the most informative first."""
    ranked = [name for name in rank_metrics(control.difference) if better_side(name) and name not in COSTS]
    return [name for name in ranked if name not in LIKELIHOODS] or ranked


def list_drops(control: Control, metrics: Sequence[str]) -> list[str]:
    """Return the metrics in which the tuned model is better with the rows' own pictures than under a control."""
    changes = countable(control.difference)
    return [metric for metric in metrics if metric in changes and direction(metric, changes[metric]) > 0]


def is_lost(metric: str, name: str, controls: Mapping[str, Control]) -> bool:
    """Whether the tuned model loses in a metric under a control, as both controls show together.

    With few answers, a constant guess under a grey picture is often right. If the rows do not show that grey pictures
    cost less than swapped ones, the loss under swapped ones decides.
    """
    if list_drops(controls[name], [metric]):
        return True
    swapped, grey = (controls[one].difference.get(metric) if one in controls else None for one in ("swapped", name))
    if swapped is None or grey is None or name == "swapped" or not list_drops(controls["swapped"], [metric]):
        return False
    return grey.low <= swapped.high and swapped.low <= grey.high


def describe_reliance(controls: dict[str, Control], lacking: Sequence[str]) -> str:
    """Return the sentence on answers that do not depend on the picture; empty if they do."""
    if not lacking:
        return ""
    if len(lacking) == len(controls):
        what = "Answers do not depend on the picture, as far as these rows show"
    elif "blind" in lacking:
        what = "The picture is not shown to help; only another row's picture makes answers worse"
    else:
        what = "Answers depend on a picture being there, not on which"
    return f"{what}: {describe_controls(controls)}."


def describe_controls(controls: dict[str, Control]) -> str:
    """Return the most informative score with the rows' own pictures, and under each control with its difference."""
    metric = judged_metrics(next(iter(controls.values())))[0]
    parts = []
    for name, control in controls.items():
        change = control.difference[metric]
        ends = "" if missing(change.low) else f" (difference {signed(change.low)} to {signed(change.high)})"
        parts.append(f"{score(control.tuned[metric])} with {CONTROLS[name]}{ends}")
    value = next(iter(controls.values())).scores.tuned[metric]
    return f"{metric.replace('_', ' ')} is {score(value)} with its own, {', '.join(parts)}"


def weigh_controls(result: Verdict, evaluation: Evaluation | None, gained: Sequence[str]) -> Verdict:
    """Add to the verdict what the controls show; `gained` are the metrics in which the tuned model is better.

    A gain that the model keeps with grey pictures, or with those of other rows, is no reason to be `better`, if most
    test rows have pictures.
    """
    if evaluation is None or not evaluation.pictured:
        return result
    reliance = find_reliance(evaluation)
    if reliance is None:
        why = "too few test rows have one" if evaluation.controls else "evaluate.controls is off"
        return replace(result, reason=f"{result.reason} Whether answers depend on the picture is unknown: {why}.")
    unneeded = [metric for metric in gained if not needs_pictures(metric, evaluation)]
    sentence = reliance.sentence or (describe_kept(gained, unneeded, evaluation) if gained else "")
    for_nothing = bool(gained) and (bool(reliance.sentence) or len(unneeded) == len(gained))
    many = evaluation.pictured >= MOST * evaluation.rows
    word = INCONCLUSIVE if for_nothing and many and result.word == "better" else result.word
    return Verdict(word, " ".join(part for part in (result.reason, sentence) if part))


def needs_pictures(metric: str, evaluation: Evaluation) -> bool:
    """Whether the tuned model is better in a metric with the rows' own pictures than under every control."""
    controls = {name: one for name, one in evaluation.controls.items() if metric in one.difference and is_judged(one)}
    return all(is_lost(metric, name, controls) for name in controls)


def describe_kept(gained: Sequence[str], unneeded: Sequence[str], evaluation: Evaluation) -> str:
    """Return how much of the gain over the base the tuned model keeps under the first control."""
    name, control = next(iter(evaluation.controls.items()))
    texts = [f"The gain in {join_names(unneeded)} does not need the picture."] if unneeded else []
    scores = control.scores
    metric = next((one for one in rank_metrics(gained) if one not in unneeded and one in scores.base), None)
    if metric is not None and (gain := scores.tuned[metric] - scores.base[metric]):
        part = (control.tuned[metric] - scores.base[metric]) / gain
        rest = f"{part:.0%}" if part > 0 else "nothing"
        texts.append(f"With {CONTROLS[name]}, {rest} of the gain in {metric.replace('_', ' ')} remains.")
    return " ".join(texts)
