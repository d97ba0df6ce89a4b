"""Metrics that no sums by row are enough for: AUROC and correlations, as functions of how often each row is drawn.

Shapes: N rows, K classes, R resamples, G groups of rows with equal numbers; T rows of a class and O others.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.metric import Measure, columns
from llmtune.evaluate.paired_statistics import Floats, Weighted

BINARY = "second label against the first"
"""The signature of an AUROC of two classes."""
NEARLY_CONSTANT = 1e-12
"""A spread below this part of the largest number is rounding."""


def measure_auroc(scores_NK: Floats, true_NK: NDArray[np.bool_], *, binary: bool) -> Measure:
    """Build the area under the ROC curve: of the second class, or the mean over the classes, each against the rest.

    A class that all rows or none belong to has no area and is left out of the mean; NaN where that is so for all.
    """
    classes = [1] if binary else list(range(true_NK.shape[1]))
    areas = [area(scores_NK[:, k], true_NK[:, k]) for k in classes]
    signature = BINARY if binary else "mean over the labels, each against the rest"
    seen = np.concatenate([scores_NK, true_NK], axis=1).astype(np.float64)
    return Measure("auroc", seen, None, signature=signature, weighted=partial(mean_of_known, areas))


def mean_of_known(parts: list[Weighted], counts_RN: Floats) -> Floats:
    """Return the mean [R] of those parts that are numbers; NaN where none is."""
    total_R, known_R = np.zeros(len(counts_RN)), np.zeros(len(counts_RN))
    for part in parts:
        values_R = part(counts_RN)
        total_R += np.nan_to_num(values_R)
        known_R += np.isfinite(values_R)
    return np.asarray(np.where(known_R > 0, total_R / np.maximum(known_R, 1), np.nan), dtype=np.float64)


def area(scores_N: Floats, true_N: NDArray[np.bool_]) -> Weighted:
    """Return the area under one ROC curve as the share of (true, other) pairs that are in order; ties count half."""
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
        return np.asarray(np.where(pairs_R > 0, in_order_R / np.maximum(pairs_R, 1), np.nan), dtype=np.float64)

    return weighted


def measure_correlation(metric: str, predicted_N: Floats, reference_N: Floats) -> Measure:
    """Build "pearson", or "spearman": the same of ranks, where equal numbers share the mean of their ranks.

    Predictions that are all the same count as 0 (a mean has no correlation with anything); references that are all the
    same as NaN.
    """
    signature = "0 where all predictions are the same"
    seen = columns(predicted_N, reference_N)
    if metric == "pearson":
        return Measure(metric, seen, None, signature=signature, weighted=partial(pearson, predicted_N, reference_N))
    assert metric == "spearman"
    predicted, reference = group(predicted_N), group(reference_N)

    def weighted(counts_RN: Floats) -> Floats:
        return pearson(ranks(predicted, counts_RN), ranks(reference, counts_RN), counts_RN)

    return Measure(metric, seen, None, signature=signature, weighted=weighted)


def group(numbers_N: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return the order of numbers [N], where groups of equal ones start in it [G], and the group of each row [N]."""
    order = np.argsort(numbers_N, kind="stable")
    new_N = np.concatenate([[True], np.diff(numbers_N[order]) != 0])[: len(order)]
    group_N = np.empty(len(order), dtype=np.intp)
    group_N[order] = np.cumsum(new_N) - 1
    return order, np.flatnonzero(new_N), group_N


def ranks(grouped: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]], counts_RN: Floats) -> Floats:
    """Return the rank [R, N] of each row among the drawn ones; equal numbers share the mean of their ranks."""
    order, starts_G, group_N = grouped
    drawn_RG = np.add.reduceat(counts_RN[:, order], starts_G, axis=1)
    ranks_RG = drawn_RG.cumsum(1) - (drawn_RG - 1) / 2
    return np.asarray(ranks_RG[:, group_N])


def pearson(predicted: Floats, reference: Floats, counts_RN: Floats) -> Floats:
    """Return Pearson's correlation [R] of numbers [N] or [R, N] with rows counted as often as they are drawn."""
    predicted_RN, predicted_R = centred(predicted, counts_RN)
    reference_RN, reference_R = centred(reference, counts_RN)
    covariance_R = (counts_RN * predicted_RN * reference_RN).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values_R = np.where(predicted_R > 0, covariance_R / (predicted_R * reference_R), 0.0)
    return np.asarray(np.where(reference_R > 0, np.clip(values_R, -1, 1), np.nan), dtype=np.float64)


def centred(numbers: Floats, counts_RN: Floats) -> tuple[Floats, Floats]:
    """Return numbers less their mean [R, N], and the root of their squares' sum [R]; 0 where they are all the same."""
    drawn_R = counts_RN.sum(1)
    mean_R = (counts_RN * numbers).sum(1) / drawn_R
    centred_RN = numbers - mean_R[:, None]
    length_R = np.sqrt((counts_RN * centred_RN**2).sum(1))
    rounding = NEARLY_CONSTANT * np.sqrt(drawn_R) * np.abs(numbers).max()
    return centred_RN, np.where(length_R > rounding, length_R, 0.0)
