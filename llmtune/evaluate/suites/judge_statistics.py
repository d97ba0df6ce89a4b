"""Statistics of a judge: its win rate corrected for its own errors, and its biases. Pure numbers, no requests.

A pair is two answers to one prompt; the first is the tuned model's, or answer A of a labelled pair. Verdicts are 1 if
the first answer wins, -1 if the second does, and 0 for a tie. Shapes: N pairs, G groups of pairs, K sums, R resamples.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", 2023, ask in both orders and count a win only
if both replies agree. Rogan and Gladen, "Estimating Prevalence from the Results of a Screening Test", 1978, correct a
share for a test's errors. Lee et al., "How to Correctly Report LLM-as-a-Judge Evaluations", 2025, do so for judges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from llmtune.evaluate.intervals import Floats, Formula, bound, typical_size
from llmtune.evaluate.metric import ratio
from llmtune.evaluate.paired_statistics import Bounds, add_up, conclude_interval, share_bounds, unknown, weigh_sums
from llmtune.evaluate.significance import ALL_CHANCE
from llmtune.recipe.evaluate_section import ERROR
from llmtune.records import Difference

LABELS = (1.0, 0.0, -1.0)


@dataclass(frozen=True)
class JudgedPairs:
    """Verdicts on N pairs, each asked in both orders."""

    shown_first_N: Floats  # noqa: N815
    """[N] verdicts with the first answer shown first."""
    shown_second_N: Floats  # noqa: N815
    """[N] verdicts with the first answer shown second."""
    longer_N: Floats  # noqa: N815
    """[N] 1 if the first answer is longer, -1 if the second is, else 0."""
    people_N: Floats = field(default_factory=lambda: np.zeros(0))  # noqa: N815
    """[N] verdicts of people; empty for test rows."""
    clusters: Sequence[int] = ()
    """[N] equal for pairs that belong together; empty if none do."""

    @property
    def verdict_N(self) -> Floats:  # noqa: N802
        """The judge's verdicts [N]: 0 if the two orders contradict each other."""
        return np.where(self.shown_first_N == self.shown_second_N, self.shown_first_N, 0.0)

    @property
    def units(self) -> int:
        """Number of independent groups of pairs."""
        return len(set(self.clusters)) if len(self.clusters) else len(self.longer_N)


@dataclass(frozen=True)
class Correction:
    """How a judge's verdict follows people's verdict and length, fitted on labelled pairs: least squares."""

    slope: float = 1.0
    """Wins minus losses of the answer that people prefer: 1 for a perfect judge, 0 for chance."""
    length: float = 0.0
    """What being longer adds to wins minus losses, at the same verdict of people."""
    covariance: Floats = field(default_factory=lambda: np.zeros((2, 2)))
    """[2, 2] of slope and length."""
    units: int = 0
    """Independent labelled pairs; 0 for a judge that is taken at its word."""

    def is_informative(self, alpha: float = ERROR) -> bool:
        """Whether the judge is shown to agree with people more often than chance."""
        error = math.sqrt(self.covariance[0, 0])
        return self.slope > student(alpha, self.units) * error if self.units else True


def student(alpha: float, units: int) -> float:
    """Return the two-sided quantile of Student's t for this many independent units."""
    import scipy.stats  # type: ignore[import-untyped]  # slow to import

    return float(scipy.stats.t.ppf(1 - alpha / 2, max(1, units - 1)))


def fit_correction(labelled: JudgedPairs, pseudo: bool = True) -> Correction:
    """Fit verdict = slope * people + length * longer by least squares, without a constant, with a cluster-robust error.

    Both orders are asked, so naming the answers the other way round turns every verdict around: there is no constant.
    With `pseudo`, two pseudo-pairs keep a judge that was right on ten pairs from a certain slope: people prefer an
    answer, and the judge agrees in one and not in the other (Agresti and Coull's idea).
    """
    design_N2 = np.stack([labelled.people_N, labelled.longer_N], axis=1)
    verdict_N, groups_N = labelled.verdict_N, group_numbers(labelled)
    if pseudo:
        design_N2 = np.concatenate([design_N2, [[1.0, 0.0], [1.0, 0.0]]])
        verdict_N, groups_N = extend(verdict_N, groups_N)
    inverse = np.linalg.pinv(design_N2.T @ design_N2)
    slope, length = inverse @ design_N2.T @ verdict_N
    residual_N = verdict_N - design_N2 @ np.array([slope, length])
    scores_G2 = add_up(design_N2 * residual_N[:, None], groups_N)
    groups = len(scores_G2)
    covariance = inverse @ scores_G2.T @ scores_G2 @ inverse * groups / max(1, groups - 2)
    return Correction(float(slope), float(length), covariance, labelled.units)


def win_rate(test: JudgedPairs, labelled: JudgedPairs | None = None, alpha: float = ERROR) -> Difference:
    """Return wins minus losses of the first answer as people would judge, with its interval.

    `labelled` corrects the judge's errors and its preference for length; without it the judge is taken at its word. The
    interval includes the uncertainty of both samples: Fieller, "Some Problems in Interval Estimation", 1954. It covers
    everything, -1 to 1, if the judge is not shown to be better than chance.

    Without `labelled`, a pair whose two orders contradict each other may be either verdict. The low end takes the worse
    one of each pair and the high end the better: Manski, "Nonparametric Bounds on Treatment Effects", 1990.
    """
    exact = fit_correction(labelled, pseudo=False) if labelled else Correction()
    fitted = fit_correction(labelled) if labelled else Correction()
    raw = float(test.verdict_N.mean() - exact.length * test.longer_N.mean())
    value = float(np.clip(raw / exact.slope, -1, 1)) if exact.slope > 0 else 0.0
    units, rows = test.units, len(test.longer_N)
    few = min(units, fitted.units or units)
    groups = units if len(test.clusters) else 0
    if few < 2 or not fitted.is_informative(alpha):
        return Difference(value, -1.0, 1.0, 1.0, rows, "Fieller" if few < 2 else ALL_CHANCE, groups)
    if labelled is None:
        worse_N, better_N = (end(test.shown_first_N, test.shown_second_N) for end in (np.minimum, np.maximum))
        low, _, of_worse = mean_interval(test, fitted, worse_N, alpha, few)
        _, high, of_better = mean_interval(test, fitted, better_N, alpha, few)
        p = of_worse if worse_N.sum() > 0 else of_better if better_N.sum() < 0 else 1.0
    else:
        low, high, p = mean_interval(test, fitted, test.verdict_N, alpha, few)
    return Difference(value, min(low, value), max(high, value), p, rows, "Fieller", groups)


def mean_interval(
    test: JudgedPairs, fitted: Correction, verdict_N: Floats, alpha: float, few: int
) -> tuple[float, float, float]:
    """Return the interval of the corrected mean of verdicts [N], and its p-value; `few` is the smaller sample."""
    verdict_N, groups_N = extend(verdict_N, group_numbers(test))
    longer_N = np.concatenate([test.longer_N, [0.0, 0.0]])
    part_N = verdict_N - fitted.length * longer_N
    mean, longer = float(part_N.mean()), float(longer_N.mean())
    sums_G = add_up((part_N - mean)[:, None], groups_N)[:, 0]
    of_mean = float(sums_G @ sums_G) / len(part_N) ** 2 * len(sums_G) / (len(sums_G) - 1)
    (of_slope, of_both), (_, of_length) = fitted.covariance.tolist()
    of_top = of_mean + longer**2 * of_length
    return fieller(mean, fitted.slope, of_top, of_slope, -longer * of_both, student(alpha, few), few)


def fieller(
    top: float, bottom: float, of_top: float, of_bottom: float, of_both: float, t: float, units: int
) -> tuple[float, float, float]:
    """Return the interval of `top / bottom` within -1 and 1, and the p-value of zero; `of_*` are (co)variances."""
    import scipy.stats

    p = 2 * float(scipy.stats.t.sf(abs(top) / math.sqrt(of_top), units - 1)) if of_top > 0 else float(top == 0)
    square = bottom**2 - t**2 * of_bottom
    if square <= 0:
        return -1.0, 1.0, 1.0
    middle = top * bottom - t**2 * of_both
    half = math.sqrt(max(0.0, middle**2 - square * (top**2 - t**2 * of_top)))
    low, high = (float(np.clip((middle + sign * half) / square, -1, 1)) for sign in (-1, 1))
    return low, high, p


def group_numbers(pairs: JudgedPairs) -> list[int]:
    """Return the number [N] of each pair's group."""
    return [*pairs.clusters] if len(pairs.clusters) else [*range(len(pairs.longer_N))]


def extend(verdict_N: Floats, groups_N: list[int]) -> tuple[Floats, list[int]]:
    """Add a pseudo-pair with either verdict, each a group of its own."""
    new = max(groups_N, default=0) + 1
    return np.concatenate([verdict_N, [1.0, -1.0]]), [*groups_N, new, new + 1]


def measure_judge(pairs: JudgedPairs, seed: int) -> dict[str, Difference]:
    """Return measures of the judge itself with their intervals; those of its errors need labelled pairs."""
    first_N, second_N, people_N = pairs.shown_first_N, pairs.shown_second_N, pairs.people_N
    every_N, longer_N = np.ones(len(first_N)), pairs.verdict_N * pairs.longer_N
    shares = {
        "ties": ((first_N == 0) & (second_N == 0), every_N),
        "inconsistent": (first_N != second_N, every_N),
        "first_position": ((first_N == 1) + 1.0 * (second_N == -1), (first_N != 0) + 1.0 * (second_N != 0)),
        "longer_wins": (longer_N > 0, longer_N != 0),
    }
    if len(people_N):
        right_N = pairs.verdict_N * people_N
        shares |= {
            "agreement": (pairs.verdict_N == people_N, every_N),
            "error_rate": (right_N < 0, right_N != 0),
        }
    parts = {
        name: Part(np.stack(both, axis=1).astype(np.float64), ratio, share_bounds) for name, both in shares.items()
    }
    if len(people_N):
        judge_N3, people_N3 = (np.stack([side == one for one in LABELS], 1) for side in (pairs.verdict_N, people_N))
        table_N33 = (judge_N3[:, :, None] & people_N3[:, None]).astype(np.float64)
        parts["kappa"] = Part(table_N33.reshape(-1, 9), kappa, kappa_bounds)
    intervals = score_intervals(parts, pairs, seed)
    return intervals | ({"length_bias": length_bias(pairs)} if len(people_N) else {})


class Part(NamedTuple):
    """One measure: sums per pair, their formula, and a worst and a best pair."""

    sums_NK: Floats  # noqa: N815
    formula: Formula
    bounds: Bounds


def score_intervals(parts: Mapping[str, Part], pairs: JudgedPairs, seed: int) -> dict[str, Difference]:
    """Return scores with intervals, with a pseudo-pair at either end of their range."""
    rows, intervals = len(pairs.longer_N), {}
    for name, part in parts.items():
        value, sums_UK = float(part.formula(part.sums_NK.sum(0))), add_up(part.sums_NK, group_numbers(pairs))
        with_ends = np.concatenate([sums_UK, *part.bounds(sums_UK)])
        ends = (len(with_ends) - len(sums_UK)) // 2
        weighted = partial(weigh_sums, part.formula, with_ends)
        intervals[name] = conclude_interval(value, bound(weighted, len(sums_UK), ends, seed), rows, pairs.clusters)
    return intervals


def kappa(sums: Floats) -> Floats:
    """[..., 9] counts of the judge's verdict by people's -> Cohen's kappa [...]; NaN if both never vary."""
    table = sums.reshape(*sums.shape[:-1], 3, 3)
    total = table.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.trace(table, axis1=-2, axis2=-1) / total
        chance = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
        return np.asarray((seen - chance) / (1 - chance), dtype=np.float64)


def kappa_bounds(sums_GK: Floats) -> tuple[Floats, Floats]:
    """Pseudo-pairs: one with full disagreement and one with full agreement, spread over the labels."""
    size = typical_size(sums_GK.sum(1))
    agree = np.eye(3).ravel()
    return ((1 - agree) * size / 6)[None], (agree * size / 3)[None]


def length_bias(labelled: JudgedPairs) -> Difference:
    """Return what being longer adds to wins minus losses at the same verdict of people, with its interval."""
    value, fitted = fit_correction(labelled, pseudo=False).length, fit_correction(labelled)
    rows, groups = len(labelled.longer_N), labelled.units if len(labelled.clusters) else 0
    if labelled.units < 2 or not labelled.longer_N.any():
        return replace(unknown(math.nan, rows), groups=groups)
    half = student(ERROR, labelled.units) * math.sqrt(fitted.covariance[1, 1])
    low, high = min(fitted.length - half, value), max(fitted.length + half, value)
    return Difference(value, low, high, 1.0, rows, "least squares", groups)
