"""The metrics of language models by name: those of tokens from their sums, those of texts from their own module.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmtune.evaluate.metric import Measure, columns, compare, measure_means, measure_right, ratio
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.text_metrics import ROUGE_METRICS, TEXT_MEASURES, chrf_formula, measure_chrf

__all__ = [
    "CHOICE_METRIC",
    "METRICS",
    "ROUGE_METRICS",
    "TEXT_MEASURES",
    "TEXT_METRICS",
    "TOKEN_METRICS",
    "Measure",
    "chrf_formula",
    "columns",
    "compare",
    "measure_chrf",
    "measure_means",
    "measure_right",
    "measure_texts",
    "measure_tokens",
    "ratio",
]

TOKEN_METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")
TEXT_METRICS = ("exact_match", *ROUGE_METRICS, "chrf")
"""Of `TEXT_MEASURES`, those of chat and completion."""
CHOICE_METRIC = "choice_accuracy"
METRICS = (*TOKEN_METRICS, *TEXT_METRICS, CHOICE_METRIC)


def exponential_ratio(sums: Floats) -> Floats:
    """[..., (nats, tokens)] -> perplexity [...]."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def measure_tokens(metric: str, nats: Floats, correct: Floats, tokens: Floats, target_bytes: Floats) -> Measure:
    """Build a metric of `TOKEN_METRICS` from row sums [N] over the supervised tokens."""
    if metric == "loss":
        return Measure(metric, columns(nats, tokens), ratio, signature="nats a supervised token, end-of-turn included")
    if metric == "perplexity":
        return Measure(metric, columns(nats, tokens), exponential_ratio, signature="exp(loss)")
    if metric == "bits_per_byte":
        signature = "bits of the supervised tokens by UTF-8 bytes of their text, end-of-turn left out of the bytes"
        return Measure(metric, columns(nats / math.log(2), target_bytes), ratio, signature=signature)
    assert metric == "accuracy"
    return Measure(metric, columns(correct, tokens), ratio, signature="share of supervised tokens predicted first")


def measure_texts(metric: str, texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Build a metric of `TEXT_MEASURES` from generated texts and references [N]."""
    assert len(texts) == len(references)
    return TEXT_MEASURES[metric](texts, references)
