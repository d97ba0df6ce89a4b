"""Metrics as sums that add up row by row and a formula over them; each equals its reference library.

Shapes: N rows, K sums a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.evaluate.statistics import Floats, Formula, difference
from llmtune.records import Difference

TOKEN_METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")
ROUGE_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TEXT_METRICS = ("exact_match", *ROUGE_METRICS, "chrf")
CHOICE_METRIC = "choice_accuracy"
METRICS = (*TOKEN_METRICS, *TEXT_METRICS, CHOICE_METRIC)


@dataclass(frozen=True)
class Measure:
    """One metric of one model on N rows."""

    metric: str
    sums_NK: Floats  # noqa: N815
    formula: Formula
    right_wrong: bool = False
    signature: str = ""

    @property
    def value(self) -> float:
        """The metric over all rows; NaN without rows."""
        if len(self.sums_NK) == 0:
            return math.nan
        return float(self.formula(self.sums_NK.sum(0)))


def compare(base: Measure, tuned: Measure, seed: int) -> Difference:
    """Return tuned minus base with its 95 % interval; both must hold the same rows in the same order."""
    assert base.metric == tuned.metric
    assert len(base.sums_NK) == len(tuned.sums_NK)
    return difference(base.sums_NK, tuned.sums_NK, tuned.formula, right_wrong=tuned.right_wrong, seed=seed)


def ratio(sums: Floats) -> Floats:
    """[..., (numerator, denominator)] -> [...]; 0 / 0 is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def exponential_ratio(sums: Floats) -> Floats:
    """[..., (nats, tokens)] -> perplexity [...]."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def chrf_formula(sums: Floats) -> Floats:
    """[..., 18] n-gram counts (hypothesis, reference, match; orders 1 to 6) -> chrF2 [...], as sacrebleu computes it.

    Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015; averages over the
    orders that both sides have.
    """
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    hypothesis, reference, match = counts[..., 0], counts[..., 1], counts[..., 2]
    effective = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(effective.sum(-1), 1)
    precision = np.where(effective, match / np.maximum(hypothesis, 1), 0).sum(-1) / orders
    recall = np.where(effective, match / np.maximum(reference, 1), 0).sum(-1) / orders
    return np.asarray(100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-300), dtype=np.float64)


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
    """Build a metric of `TEXT_METRICS` from generated texts and references [N]."""
    assert len(texts) == len(references)
    if metric == "exact_match":
        return measure_right(
            [text.strip() == want.strip() for text, want in zip(texts, references, strict=True)], metric
        )
    if metric == "chrf":
        return measure_chrf(texts, references)
    assert metric in ROUGE_METRICS
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([metric], use_stemmer=False)
    scores = [scorer.score(want, text)[metric].fmeasure for text, want in zip(texts, references, strict=True)]
    return measure_means(
        metric, scores, "rouge-score F1, no stemmer" + (", sentences by line" if metric == "rougeLsum" else "")
    )


def measure_right(
    right: Sequence[bool], metric: str, signature: str = "texts equal once outer white space is stripped"
) -> Measure:
    """Build a right-or-wrong metric from one answer a row."""
    values = np.asarray(right, dtype=np.float64)
    return Measure(metric, columns(values, np.ones(len(values))), ratio, right_wrong=True, signature=signature)


def measure_means(metric: str, values: Sequence[float], signature: str) -> Measure:
    """Build a metric that is the mean of one number a row."""
    return Measure(
        metric, columns(np.asarray(values, dtype=np.float64), np.ones(len(values))), ratio, signature=signature
    )


def measure_chrf(texts: Sequence[str], references: Sequence[str]) -> Measure:
    """Build corpus chrF: n-gram counts are summed over the rows before the score is taken."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()
    if not texts:
        return Measure("chrf", np.empty((0, 3 * scorer.order)), chrf_formula)
    # The counts a row have no public name; a test holds their formula against `corpus_score`.
    counts = np.asarray(scorer._extract_corpus_statistics(list(texts), [list(references)]), dtype=np.float64)
    return Measure("chrf", counts, chrf_formula, signature=f"corpus chrF2, sacrebleu {scorer.get_signature()}")


def columns(*parts: Floats) -> Floats:
    """Stack K columns [N] into [N, K]."""
    return np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=1)
