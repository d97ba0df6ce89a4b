"""What each metric means, which way it is better, and how much it tells a reader."""

from __future__ import annotations

from collections.abc import Iterable

from llmtune.recipe.task_facts import NEAREST_TO_ONE, TASK_FACTS
from llmtune.records import Difference

CHOICE = "choice_accuracy"
LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "bits_per_byte", "wer", "cer", "ter", "mse", "mae", "kl", "answers_cut"},
)
COSTS = frozenset({"kl", "answers_cut"})
"""What a gain is paid with, or measured under: worse in these alone is no harm."""

METRIC_NOTES = {
    CHOICE: "reference is the likeliest answer; does not depend on wording",
    "bleu": "word n-grams in common, 0 to 100",
    "wer": "wrong words by reference words",
    "cer": "wrong characters by reference characters",
    "exact_match": "answer equals the reference",
    "rougeL": "longest common sequence",
    "rougeLsum": "longest common sequence by line",
    "rouge1": "words in common",
    "rouge2": "word pairs in common",
    "chrf": "character n-grams in common, 0 to 100",
    "ter": "edits by 100 reference words",
    "tool_arguments": "calls equal the reference by value",
    "tool_name": "calls the right tools",
    "tool_arguments_f1": "argument values that are right: precision and recall in one",
    "tool_call_valid": "calls a tool, with arguments that its schema takes",
    "no_call": "calls no tool where none is to be called",
    "f1": "words in common with the nearest reference",
    "accuracy": "token predicted first",
    "f1_macro": "mean F1 of the classes, each counts the same",
    "f1_weighted": "mean F1 of the classes, by their rows",
    "f1_micro": "F1 of all classes together",
    "matthews": "agreement beyond chance, −1 to 1",
    "auroc": "right class ranked above the others; 0.5 is chance",
    "precision": "share of what was found that is right",
    "recall": "share of what is there that was found",
    "mae": "mean error, in units of the label",
    "mse": "mean of squared errors",
    "spearman": "correlation of the ranks, −1 to 1",
    "pearson": "correlation of the numbers, −1 to 1",
    "likelihood_accuracy": "better answer is the likelier one",
    "margin": "how far better answers are above worse ones",
    "loss": "nats per token of the reference",
    "bits_per_byte": "loss in bits by bytes of text",
    "perplexity": "exp of the loss",
    "length_ratio": "length by that of the reference; best near 1",
    "kl": "how far from the base model, nats per token; a cost",
    "answers_cut": "answers that max_new_tokens ended",
}
"""What each metric is, those that say most to a person first."""


def metric_note(metric: str, task: str | None) -> str:
    """Return in a few words what a metric of a task is; nothing for one that is not known."""
    own = TASK_FACTS[task].metric_notes if task in TASK_FACTS else {}
    return own.get(metric) or METRIC_NOTES.get(metric, "")


def rank_metrics(metrics: Iterable[str]) -> list[str]:
    """Put metrics in order of how much they say to a person."""
    ranks = {name: rank for rank, name in enumerate(METRIC_NOTES)}
    return sorted(metrics, key=lambda name: ranks.get(name, len(ranks)))


def direction(metric: str, change: Difference) -> int:
    """Return 1 where the interval lies wholly on the better side of zero, -1 on the worse, 0 otherwise."""
    sign = 1 if change.low > 0 else -1 if change.high < 0 else 0
    return sign * better_side(metric)


def better_side(metric: str) -> int:
    """Return 1 where more is better, -1 where less is, 0 where neither is."""
    return 0 if metric in NEAREST_TO_ONE else -1 if metric in LOWER_IS_BETTER else 1
