"""Metrics of predicted classes and numbers: one label, many labels, regression, tags.

They equal those of scikit-learn, and those of seqeval for tags.

Scores are probabilities of K classes per row (one label), K independent probabilities (many labels), or one
number (regression). AUROC and correlations cannot be computed from sums per row: they are functions of how often
each row is drawn. Shapes: N rows, K classes, R resamples, G groups of rows with equal numbers; T rows of a class
and O others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.intervals import Floats, Weighted
from llmtune.evaluate.metric import (
    Measure,
    class_bounds,
    columns,
    correlation_bounds,
    hit_bounds,
    measure_means,
    measure_right,
    quotient,
    rank_bounds,
    ratio,
)
from llmtune.evaluate.paired_statistics import RankStatistic, share_bounds

LabelKind = Literal["single", "multi", "regression"]
TrueLabel = str | float | Sequence[str]
"""The right label, number, or labels of one row."""
F1_METRICS = ("f1_macro", "f1_micro", "f1_weighted")
CLASS_METRICS: dict[LabelKind, tuple[str, ...]] = {
    "single": ("accuracy", *F1_METRICS, "matthews", "auroc"),
    "multi": ("accuracy", *F1_METRICS, "auroc"),
    "regression": ("mse", "mae", "pearson", "spearman"),
}
THRESHOLD = 0.5
"""A multi-label row gets each label above this probability."""
BINARY = "second label against the first"
"""The signature of an AUROC of two classes."""
MEAN_AREA = "mean over the labels, each against the rest"
"""The signature of an AUROC of more."""
NEARLY_CONSTANT = 1e-12
"""A spread below this fraction of the largest number is rounding."""


def measure_classes(
    metric: str, kind: LabelKind, scores_NK: Floats, references: Sequence[TrueLabel], labels: Sequence[str]
) -> Measure:
    """Build a metric of `CLASS_METRICS[kind]`; `references` are names from `labels` [K] (regression: numbers)."""
    assert metric in CLASS_METRICS[kind]
    assert len(scores_NK) == len(references)
    if kind == "regression":
        return measure_numbers(metric, scores_NK[:, 0], np.array(references, dtype=np.float64))
    true_NK = true_classes(kind, references, labels)
    if metric == "auroc":
        return measure_auroc(scores_NK, true_NK, binary=kind == "single" and len(labels) == 2)
    predicted_NK = predicted_classes(kind, scores_NK)
    if metric == "accuracy":
        right = (predicted_NK == true_NK).all(1)
        signature = (
            "likeliest label is the right one" if kind == "single" else "all labels of a row are right, none more"
        )
        return measure_right(right.tolist(), metric, signature)
    if metric == "matthews":
        sums = class_sums(predicted_NK, true_NK)
        return Measure(metric, sums, matthews_formula, signature="0 if undefined", bounds=class_bounds)
    return measure_f1(metric, predicted_NK, true_NK)


def true_classes(kind: LabelKind, references: Sequence[TrueLabel], labels: Sequence[str]) -> NDArray[np.bool_]:
    """Return which classes [N, K] are right; each reference must be a label, or labels, of `labels`."""
    index = {label: k for k, label in enumerate(labels)}
    true_NK = np.zeros((len(references), len(labels)), dtype=np.bool_)
    for n, reference in enumerate(references):
        names = [reference] if kind == "single" else reference
        assert isinstance(names, Sequence)
        true_NK[n, [index[str(name)] for name in names]] = True
    return true_NK


def predicted_classes(kind: LabelKind, scores_NK: Floats) -> NDArray[np.bool_]:
    """Return which classes [N, K] are predicted: the first most likely one, or for "multi" all above the threshold."""
    if kind == "multi":
        return np.asarray(scores_NK > THRESHOLD)
    classes = np.arange(scores_NK.shape[1])
    return np.asarray(
        scores_NK.argmax(1)[:, None] == classes if len(scores_NK) else np.empty(scores_NK.shape, np.bool_)
    )


def class_sums(predicted_NK: NDArray[np.bool_], true_NK: NDArray[np.bool_]) -> Floats:
    """Return [N, 3K]: per class whether it is a hit, predicted, and right."""
    return np.concatenate([predicted_NK & true_NK, predicted_NK, true_NK], axis=1).astype(np.float64)


def split_sums(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """[..., 3K] -> hits, predicted and right rows by class, [..., K] each."""
    hits, predicted, true = np.split(sums, 3, axis=-1)
    return hits, predicted, true


def measure_f1(metric: str, predicted_NK: NDArray[np.bool_], true_NK: NDArray[np.bool_]) -> Measure:
    """Build a metric of `F1_METRICS`; the micro average needs no sums per class."""
    sums = class_sums(predicted_NK, true_NK)
    if metric == "f1_micro":
        pooled = columns(*(part.sum(1) for part in split_sums(sums)))
        signature = "F1 over all classes together"
        return Measure(metric, pooled, f1_macro_formula, signature=signature, bounds=hit_bounds)
    if metric == "f1_macro":
        signature = "mean F1 of the classes that are right or predicted at least once"
        return Measure(metric, sums, f1_macro_formula, signature=signature, bounds=class_bounds)
    signature = "mean F1 of the classes, weighted by their rows"
    return Measure(metric, sums, f1_weighted_formula, signature=signature, bounds=class_bounds)


def f1_by_class(sums: Floats) -> Floats:
    """[..., 3K] -> F1 per class [..., K]; 0 for a class that is neither right nor predicted anywhere."""
    hits, predicted, true = split_sums(sums)
    return quotient(2 * hits, predicted + true)


def f1_macro_formula(sums: Floats) -> Floats:
    """[..., 3K] -> mean F1 [...] of the classes that occur; 0 if none does."""
    _, predicted, true = split_sums(sums)
    occurring = ((predicted + true) > 0).sum(-1)
    return quotient(f1_by_class(sums).sum(-1), occurring)


def f1_weighted_formula(sums: Floats) -> Floats:
    """[..., 3K] -> mean F1 [...], each class weighted by its rows; 0 without rows."""
    _, _, true = split_sums(sums)
    return quotient((f1_by_class(sums) * true).sum(-1), true.sum(-1))


def matthews_formula(sums: Floats) -> Floats:
    """[..., 3K] -> Matthews' correlation [...] of K classes; 0 if all predictions or all labels are one class.

    Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
    """
    hits, predicted, true = split_sums(sums)
    rows, right = true.sum(-1), hits.sum(-1)
    covariance = right * rows - (predicted * true).sum(-1)
    spread = (rows**2 - (predicted**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
    return quotient(covariance, np.sqrt(np.where(spread > NEARLY_CONSTANT * rows**4, spread, 0.0)))


def measure_numbers(metric: str, predicted_N: Floats, reference_N: Floats) -> Measure:
    """Build a metric of regression."""
    if metric == "mse":
        return measure_means(metric, ((predicted_N - reference_N) ** 2).tolist(), "mean of squared errors")
    if metric == "mae":
        return measure_means(metric, np.abs(predicted_N - reference_N).tolist(), "mean of absolute errors")
    return measure_correlation(metric, predicted_N, reference_N)


def class_table(
    kind: LabelKind, scores_NK: Floats, references: Sequence[TrueLabel], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return `label`, `precision`, `recall`, `f1` and `support` (rows) of each of `labels`; 0 where undefined."""
    sums = class_sums(predicted_classes(kind, scores_NK), true_classes(kind, references, labels)).sum(0)
    hits, predicted, true = split_sums(sums)
    rows = zip(
        labels, hits / np.maximum(predicted, 1), hits / np.maximum(true, 1), f1_by_class(sums), true, strict=True
    )
    return [
        {"label": label, "precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(count)}
        for label, precision, recall, f1, count in rows
    ]


def confusion(scores_NK: Floats, references: Sequence[TrueLabel], labels: Sequence[str]) -> list[list[int]]:
    """Count rows [K, K] with one label: by the right one down, by the predicted one across."""
    true_NK = true_classes("single", references, labels).astype(np.int64)
    counts_KK: list[list[int]] = (true_NK.T @ predicted_classes("single", scores_NK).astype(np.int64)).tolist()
    return counts_KK


def majority_scores(references: Sequence[TrueLabel], kind: LabelKind, labels: Sequence[str], count: int) -> Floats:
    """Return the scores [count, K] of a baseline that knows only the training references, the same for each row.

    They are the labels' shares, so the most frequent label is predicted ("multi": labels of more than half the rows).
    Regression: the mean number, [count, 1].
    """
    assert references
    if kind == "regression":
        return np.full((count, 1), np.array(references, dtype=np.float64).mean())
    return np.tile(true_classes(kind, references, labels).mean(0), (count, 1))


# Metrics of ranks


def measure_auroc(scores_NK: Floats, true_NK: NDArray[np.bool_], *, binary: bool) -> Measure:
    """Build the area under the ROC curve of the second class, or the mean over the classes, each against the rest.

    Classes with all rows or none have no area and are excluded from the mean; NaN if no class has an area.
    """
    signature = BINARY if binary else MEAN_AREA
    seen_NK = np.concatenate([scores_NK, true_NK], axis=1).astype(np.float64)
    ranking = second_area if binary else mean_area
    return Measure("auroc", seen_NK, None, signature=signature, ranking=ranking, bounds=rank_bounds)


def second_area(seen_NK: Floats) -> Weighted:
    """Return the area of the second class from [N, 2 K]: scores, then which class is right."""
    return area(seen_NK[:, 1], seen_NK[:, seen_NK.shape[1] // 2 + 1] > 0)


def mean_area(seen_NK: Floats) -> Weighted:
    """Return the mean area of those classes that have one."""
    areas = [area(scores_N, true_N > 0) for scores_N, true_N in zip(*np.split(seen_NK.T, 2), strict=True)]

    def weighted(counts_RN: Floats) -> Floats:
        total_R, known_R = np.zeros(len(counts_RN)), np.zeros(len(counts_RN))
        for one in areas:
            values_R = one(counts_RN)
            total_R += np.nan_to_num(values_R)
            known_R += np.isfinite(values_R)
        return np.asarray(np.where(known_R > 0, total_R / np.maximum(known_R, 1), np.nan), dtype=np.float64)

    return weighted


def area(scores_N: Floats, true_N: NDArray[np.bool_]) -> Weighted:
    """Return the area under one ROC curve as the share of ordered (true, other) pairs; ties count half."""
    true_T, other_O = np.flatnonzero(true_N), np.flatnonzero(~true_N)
    other_O = other_O[np.argsort(scores_N[other_O])]
    first_T = np.searchsorted(scores_N[other_O], scores_N[true_T], side="left")
    after_T = np.searchsorted(scores_N[other_O], scores_N[true_T], side="right")

    def weighted(counts_RN: Floats) -> Floats:
        true_RT = counts_RN.take(true_T, axis=1)
        others_RO = np.zeros((len(counts_RN), len(other_O) + 1))
        counts_RN.take(other_O, axis=1).cumsum(1, out=others_RO[:, 1:])
        below_RT = (others_RO.take(first_T, axis=1) + others_RO.take(after_T, axis=1)) / 2
        pairs_R = true_RT.sum(1) * others_RO[:, -1]
        in_order_R = np.einsum("rt,rt->r", true_RT, below_RT)
        return np.asarray(np.where(pairs_R > 0, quotient(in_order_R, pairs_R), np.nan), dtype=np.float64)

    return weighted


def measure_correlation(metric: str, predicted_N: Floats, reference_N: Floats) -> Measure:
    """Build "pearson" or "spearman" (Pearson on ranks; equal numbers share their mean rank).

    Constant predictions give 0 (a mean correlates with nothing); constant references give NaN.
    """
    signature = "0 if all predictions are equal"
    seen_N2, ranking = columns(predicted_N, reference_N), RANKINGS[metric]
    return Measure(metric, seen_N2, None, signature=signature, ranking=ranking, bounds=correlation_bounds)


def correlation(seen_N2: Floats) -> Weighted:
    """Return Pearson's correlation of two columns."""
    return partial(pearson, seen_N2[:, 0], seen_N2[:, 1])


def rank_correlation(seen_N2: Floats) -> Weighted:
    """Return Spearman's correlation of two columns."""
    predicted, reference = map(group, seen_N2.T)
    return lambda counts_RN: pearson(ranks(predicted, counts_RN), ranks(reference, counts_RN), counts_RN)


RANKINGS: dict[str, RankStatistic] = {
    "auroc": mean_area,
    BINARY: second_area,
    "pearson": correlation,
    "spearman": rank_correlation,
}
"""By metric, or by signature for the one metric that has two."""


def group(numbers_N: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return the order of numbers [N], the start of each group of equal ones in it [G], and each row's group [N]."""
    order = np.argsort(numbers_N, kind="stable")
    new_N = np.concatenate([[True], np.diff(numbers_N[order]) != 0])[: len(order)]
    group_N = np.empty(len(order), dtype=np.intp)
    group_N[order] = np.cumsum(new_N) - 1
    return order, np.flatnonzero(new_N), group_N


def ranks(grouped: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]], counts_RN: Floats) -> Floats:
    """Return the rank [R, N] of each row among the drawn ones; equal numbers share their mean rank."""
    order, starts_G, group_N = grouped
    drawn_RG = np.add.reduceat(counts_RN[:, order], starts_G, axis=1)
    ranks_RG = drawn_RG.cumsum(1) - (drawn_RG - 1) / 2
    return np.asarray(ranks_RG[:, group_N])


def pearson(predicted: Floats, reference: Floats, counts_RN: Floats) -> Floats:
    """Return Pearson's correlation [R] of numbers [N] or [R, N], each row weighted by how often it was drawn."""
    predicted_RN, predicted_R = centred(predicted, counts_RN)
    reference_RN, reference_R = centred(reference, counts_RN)
    covariance_R = (counts_RN * predicted_RN * reference_RN).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values_R = np.where(predicted_R > 0, covariance_R / (predicted_R * reference_R), 0.0)
    return np.asarray(np.where(reference_R > 0, np.clip(values_R, -1, 1), np.nan), dtype=np.float64)


def centred(numbers: Floats, counts_RN: Floats) -> tuple[Floats, Floats]:
    """Return numbers minus their mean [R, N], and their norm [R]; 0 if they are constant."""
    drawn_R = counts_RN.sum(1)
    mean_R = (counts_RN * numbers).sum(1) / drawn_R
    centred_RN = numbers - mean_R[:, None]
    length_R = np.sqrt((counts_RN * centred_RN**2).sum(1))
    rounding = NEARLY_CONSTANT * np.sqrt(drawn_R) * np.abs(numbers).max()
    return centred_RN, np.where(length_R > rounding, length_R, 0.0)


# Tagged tokens: an entity counts if its span and type are right


Entity = tuple[str, int, int]
"""Type, first and last token."""
Tags = Sequence[Sequence[str]]
"""IOB2 tags of the tokens of N rows."""


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of one row, as lenient as conlleval: an I- without its B- starts an entity too."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [(kind, int(first), int(last)) for kind, first, last in get_entities(list(tags))]


def measure_entities(metric: str, predicted_tags: Tags, reference_tags: Tags) -> Measure:
    """Build a metric of `ENTITY_METRICS` from the predicted and reference tags of N rows."""
    rows = list(zip(predicted_tags, reference_tags, strict=True))
    assert all(len(predicted) == len(reference) for predicted, reference in rows)
    if metric == "accuracy":
        right = [sum(tag == wanted for tag, wanted in zip(*row, strict=True)) for row in rows]
        sums_N2 = columns(np.array(right), np.array([len(reference) for _, reference in rows]))
        return Measure(metric, sums_N2, ratio, signature="share of tokens with the right tag", bounds=share_bounds)
    entities = [(set(entities_of(predicted)), set(entities_of(reference))) for predicted, reference in rows]
    counts = [(len(predicted & expected), len(predicted), len(expected)) for predicted, expected in entities]
    sums_N3 = np.array(counts, dtype=np.float64).reshape(-1, 3)
    signature = "entities of all types together, right if type, first and last token match; 0 without entities"
    return Measure(metric, sums_N3, ENTITY_FORMULAS[metric], signature=signature, bounds=hit_bounds)


def precision_formula(sums: Floats) -> Floats:
    """[..., (hits, predicted, right)] -> hits by predicted [...]."""
    return quotient(sums[..., 0], sums[..., 1])


def recall_formula(sums: Floats) -> Floats:
    """[..., (hits, predicted, right)] -> hits by right [...]."""
    return quotient(sums[..., 0], sums[..., 2])


def f1_formula(sums: Floats) -> Floats:
    """[..., (hits, predicted, right)] -> harmonic mean of precision and recall [...]."""
    return quotient(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


ENTITY_FORMULAS = {"precision": precision_formula, "recall": recall_formula, "f1": f1_formula}
ENTITY_METRICS = (*ENTITY_FORMULAS, "accuracy")


def entity_table(predicted_tags: Tags, reference_tags: Tags) -> list[dict[str, Any]]:
    """Return `label`, `precision`, `recall`, `f1` and `support` (entities) of each type that occurs, by name."""
    hits, predictions, expected = Counter[str](), Counter[str](), Counter[str]()
    for predicted, reference in zip(predicted_tags, reference_tags, strict=True):
        predicted_set, reference_set = set(entities_of(predicted)), set(entities_of(reference))
        hits.update(kind for kind, _, _ in predicted_set & reference_set)
        predictions.update(kind for kind, _, _ in predicted_set)
        expected.update(kind for kind, _, _ in reference_set)
    table = []
    for kind in sorted(predictions | expected):
        sums = np.array([hits[kind], predictions[kind], expected[kind]], dtype=np.float64)
        scores = {metric: float(formula(sums)) for metric, formula in ENTITY_FORMULAS.items()}
        table.append({"label": kind, **scores, "support": expected[kind]})
    return table
