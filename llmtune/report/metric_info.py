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
    "loss": "nats per token of the reference",
    "perplexity": "exp of the loss",
    "bits_per_byte": "loss in bits by bytes of text",
    "accuracy": "token predicted first",
    "exact_match": "answer equals the reference",
    "rouge1": "words in common",
    "rouge2": "word pairs in common",
    "rougeL": "longest common sequence",
    "rougeLsum": "longest common sequence by line",
    "chrf": "character n-grams in common, 0 to 100",
    "bleu": "word n-grams in common, 0 to 100",
    "ter": "edits by 100 reference words",
    "length_ratio": "length by that of the reference; best near 1",
    "f1": "words in common with the nearest reference",
    "f1_macro": "mean F1 of the classes, each counts the same",
    "f1_micro": "F1 of all classes together",
    "f1_weighted": "mean F1 of the classes, by their rows",
    "matthews": "agreement beyond chance, −1 to 1",
    "auroc": "right class ranked above the others; 0.5 is chance",
    "mse": "mean of squared errors",
    "mae": "mean error, in units of the label",
    "pearson": "correlation of the numbers, −1 to 1",
    "spearman": "correlation of the ranks, −1 to 1",
    "precision": "share of what was found that is right",
    "recall": "share of what is there that was found",
    "wer": "wrong words by reference words",
    "cer": "wrong characters by reference characters",
    "margin": "how far better answers are above worse ones",
    "likelihood_accuracy": "better answer is the likelier one",
    "tool_call_valid": "calls a tool, with arguments that its schema takes",
    "tool_name": "calls the right tools",
    "tool_arguments": "calls equal the reference by value",
    "tool_arguments_f1": "argument values that are right: precision and recall in one",
    "no_call": "calls no tool where none is to be called",
    "answers_cut": "answers that max_new_tokens ended",
    "kl": "how far from the base model, nats per token; a cost",
    CHOICE: "reference is the likeliest answer; does not depend on wording",
}
HEADLINES = (
    *(CHOICE, "bleu", "wer", "cer", "exact_match", "rougeL", "rougeLsum", "rouge1", "rouge2", "chrf", "ter"),
    *("tool_arguments", "tool_name", "tool_arguments_f1", "tool_call_valid", "no_call"),
    *("f1", "accuracy", "f1_macro", "f1_weighted", "f1_micro", "matthews", "auroc", "precision", "recall"),
    *("mae", "mse", "spearman", "pearson", "likelihood_accuracy", "margin"),
    *("loss", "bits_per_byte", "perplexity", "length_ratio", "kl", "answers_cut"),
)
"""Metrics by how much they say to a person."""


def metric_note(metric: str, task: str | None) -> str:
    """Return in a few words what a metric of a task is; nothing for one that is not known."""
    own = TASK_FACTS[task].metric_notes if task in TASK_FACTS else {}
    return own.get(metric) or METRIC_NOTES.get(metric, "")


def rank_metrics(metrics: Iterable[str]) -> list[str]:
    """Put metrics in order of how much they say to a person."""
    return sorted(metrics, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))


def direction(metric: str, change: Difference) -> int:
    """Return 1 where the interval lies wholly on the better side of zero, -1 on the worse, 0 otherwise."""
    sign = 1 if change.low > 0 else -1 if change.high < 0 else 0
    return sign * better_side(metric)


def better_side(metric: str) -> int:
    """Return 1 where more is better, -1 where less is, 0 where neither is."""
    return 0 if metric in NEAREST_TO_ONE else -1 if metric in LOWER_IS_BETTER else 1
