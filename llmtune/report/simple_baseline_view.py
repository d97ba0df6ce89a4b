"""The tuned model against a baseline without a language model: a section of the report, and its part in the verdict."""

from __future__ import annotations

from llmtune.display.blocks import Block, Compared, Section, Text, difference_table
from llmtune.display.number_format import missing, score, signed
from llmtune.evaluate.metric_info import COSTS, better_side, direction, full_note, rank_metrics
from llmtune.evaluate.significance import INCONCLUSIVE
from llmtune.evaluate.verdict import BETTER, MIXED, WORSE
from llmtune.records import FEWEST_ROWS
from llmtune.store.report_record import Verdict
from llmtune.store.score_records import Evaluation, SimpleBaseline


def simple_baseline_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return a row per metric against the simple baseline, and how it was fitted."""
    simple = evaluation.simple_baseline
    if simple is None or is_base(simple, evaluation):
        return Section("Against a simple baseline", [])
    rows = [
        Compared(name, simple.scores[name], simple.tuned[name], change, better_side(name), full_note(name, task))
        for name, change in simple.difference.items()
    ]
    text = f"`{simple.name}` needs no language model and answered the same rows: {simple.note}."
    blocks: list[Block] = [difference_table(rows, base=simple.name, code=True), Text(text, "note")]
    return Section(f"Against {simple.title}", blocks if rows else [], "Baseline", "simple-baseline")


def is_base(simple: SimpleBaseline, evaluation: Evaluation) -> bool:
    """Whether the baseline replaces the base model: its scores are shown already."""
    return bool(evaluation.baseline) and all(evaluation.base.get(name) == one for name, one in simple.scores.items())


def find_unbeaten(evaluation: Evaluation | None) -> tuple[str, int] | None:
    """Return the metric in which the tuned model is not shown to beat the simple baseline, and its side.

    The side is -1 if the baseline is better, else 0. The most informative metric decides. None if the baseline is
    beaten, or cannot be compared.
    """
    simple = evaluation.simple_baseline if evaluation else None
    if evaluation is None or simple is None or is_base(simple, evaluation):
        return None
    ranked = (name for name in rank_metrics(simple.difference) if better_side(name) and name not in COSTS)
    metric = next(ranked, None)
    change = simple.difference[metric] if metric else None
    if metric is None or change is None or change.n < FEWEST_ROWS or (side := direction(metric, change)) > 0:
        return None
    return metric, side


def simple_title(word: str, evaluation: Evaluation) -> tuple[str, str] | None:
    """Return the word and the opponent for the title of a verdict that `weigh_simple_baseline` changed; else None."""
    simple, unbeaten = evaluation.simple_baseline, find_unbeaten(evaluation)
    if simple is None or unbeaten is None or not evaluation.baseline or evaluation.champion is not None:
        return None
    shown = {(INCONCLUSIVE, 0): INCONCLUSIVE, (MIXED, -1): WORSE}.get((word, unbeaten[1]))
    return (shown, simple.title) if shown else None


def weigh_simple_baseline(found: Verdict, evaluation: Evaluation | None) -> Verdict:
    """Add a sentence to the verdict unless the tuned model is shown to be better than the simple baseline.

    `better` than a trivial baseline then becomes `mixed` if the tuned model is shown to be worse than the simple one,
    else `inconclusive`.
    """
    simple, unbeaten = evaluation.simple_baseline if evaluation else None, find_unbeaten(evaluation)
    if evaluation is None or simple is None or unbeaten is None:
        return found
    metric, side = unbeaten
    change = simple.difference[metric]
    ends = "" if missing(change.low) else f" ({signed(change.low)} to {signed(change.high)})"
    how = "Worse" if side else "Not better" if better_side(metric) * change.value <= 0 else "Not clearly better"
    numbers = f"{metric.replace('_', ' ')} {score(simple.tuned[metric])} against {score(simple.scores[metric])}{ends}"
    reason = f"{found.reason} {how} than {simple.title}: {numbers}."
    word = found.word
    if word == BETTER and evaluation.baseline and evaluation.champion is None:
        word = MIXED if side else INCONCLUSIVE
    return Verdict(word, reason)
