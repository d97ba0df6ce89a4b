"""The facts of each task that need no library: its metrics, its section, the rows it reads, whether it is here yet."""

from __future__ import annotations

from dataclasses import dataclass

LANGUAGE = ("loss", "perplexity", "bits_per_byte", "accuracy")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
GENERATED = ("exact_match", *ROUGE, "chrf")
"""Metrics that need generated answers."""

ROW_FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text")
COLUMNS = (
    "completion",
    "conversations",
    "functions",
    "history",
    "input",
    "instruction",
    "messages",
    "output",
    "prompt",
    "system",
    "text",
    "tools",
)
"""Names of columns that rows are made of: what the keys of a source's `columns` may be."""


@dataclass(frozen=True)
class TaskFacts:
    """What a recipe may say about one task."""

    name: str
    summary: str
    metrics: tuple[str, ...]
    default_metrics: tuple[str, ...]
    formats: tuple[str, ...]
    """Row formats by name, as in a source's `format`."""
    section: str | None = None
    """Name of the section that only this task has."""
    available: bool = False


def _facts(*facts: TaskFacts) -> dict[str, TaskFacts]:
    return {fact.name: fact for fact in facts}


TASK_FACTS = _facts(
    TaskFacts(
        "chat",
        "answer in a conversation",
        (*LANGUAGE, *GENERATED, "choice_accuracy"),
        ("loss", "perplexity", "bits_per_byte", "accuracy", "exact_match", "rougeL", "chrf", "choice_accuracy"),
        ("messages", "sharegpt", "alpaca", "prompt-completion"),
        available=True,
    ),
    TaskFacts(
        "completion",
        "go on with a text",
        (*LANGUAGE, *GENERATED, "choice_accuracy"),
        ("loss", "perplexity", "bits_per_byte", "accuracy"),
        ("prompt-completion", "alpaca", "text"),
        section="completion",
        available=True,
    ),
    TaskFacts(
        "translate",
        "put a text into another language",
        ("loss", "bleu", "chrf", "ter", "exact_match"),
        ("loss", "bleu", "chrf"),
        (),
        section="translate",
    ),
    TaskFacts(
        "summarize",
        "say a text in fewer words",
        ("loss", *ROUGE, "chrf"),
        ("loss", "rouge1", "rouge2", "rougeLsum"),
        (),
        section="summarize",
    ),
    TaskFacts(
        "qa", "find the answer in a text", ("loss", "exact_match", "f1"), ("exact_match", "f1"), (), section="qa"
    ),
    TaskFacts(
        "classify",
        "put a text into a class",
        ("loss", "accuracy", "f1_macro", "f1_micro", "matthews"),
        ("loss", "accuracy", "f1_macro"),
        (),
        section="classify",
    ),
    TaskFacts(
        "token-classify",
        "mark words in a text",
        ("loss", "f1", "precision", "recall", "accuracy"),
        ("loss", "f1", "precision", "recall"),
        (),
        section="token_classify",
    ),
    TaskFacts(
        "speech", "write down what is said", ("loss", "wer", "cer"), ("loss", "wer", "cer"), (), section="speech"
    ),
    TaskFacts(
        "preference",
        "prefer one answer to another",
        ("loss", "accuracy", "margin"),
        ("loss", "accuracy", "margin"),
        (),
        section="preference",
    ),
)
"""Every task by name, in the order of the documentation."""

AVAILABLE = tuple(name for name, facts in TASK_FACTS.items() if facts.available)
