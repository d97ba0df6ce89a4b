"""Meaning, better direction and rank of each metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmtune.display.number_format import missing
from llmtune.recipe.gate_grammar import LOWER_IS_BETTER
from llmtune.recipe.task_facts import COST, NEAREST_TO_ONE, TASK_FACTS
from llmtune.recipe.task_variant import at_ten
from llmtune.records import Difference
from llmtune.store.score_records import Decided

CHOICE = "choice_accuracy"
COSTS = frozenset({"kl", "answers_cut", "samples_cut", "answer_tokens", "ece", "random_cosine", "effective_rank"})
"""Metrics that show the cost or conditions of a gain. A change in only these does not make a model worse."""

METRIC_NOTES = {
    "ndcg@10": "order of the first k passages, by graded relevance",
    "mrr@10": "1 / rank of the first relevant passage; 0 beyond rank k",
    **dict.fromkeys(("recall@1", "recall@5", "recall@10"), "share of a query's relevant passages among the first k"),
    "map": "mean precision at the ranks of the relevant passages",
    "reward": "mean reward of sampled answers",
    "greedy_reward": "reward of the greedy answer",
    **dict.fromkeys(("pass@1", "pass@8", "pass@10"), "chance that one of k sampled answers is accepted"),
    CHOICE: "reference is the likeliest choice; independent of wording",
    "bleu": "shared word n-grams, 0 to 100",
    "wer": "wrong words per reference word",
    "cer": "wrong characters per reference character",
    "exact_match": "answer equals the reference",
    "rougeL": "longest common subsequence",
    "rougeLsum": "longest common subsequence per line",
    "rouge1": "shared words",
    "rouge2": "shared word pairs",
    "chrf": "shared character n-grams, 0 to 100",
    "ter": "edits per 100 reference words",
    "tool_arguments": "calls equal the reference in name and arguments",
    "tool_name": "calls the right tools",
    "tool_arguments_f1": "F1 of the argument values",
    "tool_call_valid": "calls a tool with arguments that fit its schema",
    "no_call": "calls no tool if the reference has no call",
    "f1": "shared words with the nearest reference",
    "accuracy": "token is the first prediction",
    "f1_macro": "mean F1 of the classes, equally weighted",
    "f1_weighted": "mean F1 of the classes, weighted by rows",
    "f1_micro": "F1 of all classes together",
    "matthews": "agreement beyond chance, −1 to 1",
    "auroc": "right class ranked above the others; 0.5 is chance",
    "precision": "share of the found ones that are right",
    "recall": "share of the true ones that were found",
    "decided": "answers that are decided; the others ask a person",
    "decided_error": "errors among decided answers",
    "set_coverage": "prediction sets with the right label (of several, their share); beyond the target is no gain",
    "set_size": "labels per prediction set",
    "false_alarms": "rows called out of scope",
    "brier": "squared error of the probabilities",
    "nll": "nats of the right label",
    "ece": "how far probabilities are from the share that is right",
    "mae": "mean error, in units of the label",
    "mse": "mean squared error",
    "random_cosine": "mean cosine of unrelated texts; near 1 if all vectors are nearly equal",
    "effective_rank": "directions that the vectors use",
    "spearman": "rank correlation, −1 to 1",
    "pearson": "linear correlation, −1 to 1",
    "likelihood_accuracy": "better answer is likelier",
    "margin": "reward of better answers minus worse answers",
    "loss": "nats per token of the reference",
    "bits_per_byte": "loss in bits per byte of text",
    "perplexity": "exp of the loss",
    "length_ratio": "length relative to the reference; best near 1",
    "kl": "distance from the base model, nats per token; a cost",
    "answers_cut": "answers truncated at max_new_tokens",
    "samples_cut": "sampled answers truncated at max_new_tokens",
    "answer_tokens": "tokens of a sampled answer; a cost",
}
"""Meaning of each metric, the most informative metrics first."""
BETTER_NOTES = {1: "higher is better", -1: "lower is better", 0: "neither more nor less is better"}


def metric_note(metric: str, task: str | None) -> str:
    """Return the meaning of a task's metric in a few words; empty if unknown."""
    notes = TASK_FACTS[task].metric_notes if task in TASK_FACTS else {}
    return notes.get(metric) or METRIC_NOTES.get(metric) or METRIC_NOTES.get(at_ten(metric), "")


def full_note(metric: str, task: str | None) -> str:
    """Return the meaning of a metric, and which side is better."""
    return "; ".join(part for part in (metric_note(metric, task), side_note(metric)) if part)


def side_note(metric: str) -> str:
    """Return which side is better, if one is."""
    return BETTER_NOTES[better_side(metric)]


def rank_metrics(metrics: Iterable[str]) -> list[str]:
    """Sort metrics, the most informative first: those without a note are the user's own."""
    ranks = {name: rank for rank, name in enumerate(METRIC_NOTES)}
    return sorted(metrics, key=lambda name: ranks.get(name, ranks.get(at_ten(name), -1)))


def direction(metric: str, change: Difference, side: int | None = None) -> int:
    """Return 1 if the interval is on the better side of zero, -1 if on the worse side, else 0.

    `side` is that of `list_sides`; without it, more than a target counts as better still.
    """
    return change.sign * (better_side(metric) if side is None else side)


def better_side(metric: str) -> int:
    """Return 1 if more is better, -1 if less is better, 0 if neither."""
    lower = metric in LOWER_IS_BETTER or metric.endswith(COST)
    return 0 if metric in NEAREST_TO_ONE else -1 if lower else 1


# Metrics with a target: a score beyond it is not better, and only a score that misses it is worse.


@dataclass(frozen=True)
class MetricTarget:
    """The score that a metric should reach."""

    value: float
    side: int
    """1: at least this score; -1: at most; 0: as near as possible."""

    def better_side(self, before: float, after: float) -> int:
        """Return 1 if more is better between two scores, -1 if less is, 0 if the difference does not matter."""
        if self.side > 0:
            return int(min(before, after) < self.value)
        if self.side < 0:
            return -int(max(before, after) > self.value)
        return 1 if max(before, after) <= self.value else -1 if min(before, after) >= self.value else 0

    def misses(self, score: float) -> bool:
        """Whether a score is on the wrong side of the target."""
        return self.side * (score - self.value) < 0


PAID_WITH = {"set_size": "set_coverage", "decided": "decided_error"}
"""Metrics that get better when the promise of another one is broken: they count only while it is kept."""


def list_targets(decided: Decided | None) -> dict[str, MetricTarget]:
    """Return the targets of metrics: those of an evaluation's decisions, and 1 for ratios."""
    targets = {metric: MetricTarget(1.0, 0) for metric in NEAREST_TO_ONE}
    record = decided.record if decided else None
    if record is not None and record.coverage is not None:
        targets["set_coverage"] = MetricTarget(record.coverage, 1)
    if record is not None and record.threshold is not None:
        targets["decided_error"] = MetricTarget(record.threshold.risk, -1)
    if record is not None and record.false_alarms is not None:
        targets["false_alarms"] = MetricTarget(record.false_alarms, -1)
    return targets


def list_sides(
    before: Mapping[str, float], after: Mapping[str, float], decided: Decided | None = None
) -> dict[str, int]:
    """Return the better side of each metric of two models, by their scores for metrics with a target."""
    targets, sides = list_targets(decided), {metric: better_side(metric) for metric in after}
    for metric, target in targets.items():
        if not missing(before.get(metric)) and not missing(after.get(metric)):
            sides[metric] = target.better_side(before[metric], after[metric])
    broken = {metric for metric, target in targets.items() if metric in after and target.misses(after[metric])}
    return {metric: 0 if PAID_WITH.get(metric) in broken else side for metric, side in sides.items()}
