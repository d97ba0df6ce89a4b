"""Rows of two models with known scores, for simulating how often an interval errs: scenes of every kind of metric.

A scene draws the quality of both models' answers, from 0 to 1 by row; a kind of metric turns qualities into sums.
Shapes: N rows, Q (base, tuned).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from llmtune.evaluate import classification_metrics as classes
from llmtune.evaluate import metric as metrics
from llmtune.evaluate import text_metrics as texts
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, own_interval, paired_difference
from llmtune.evaluate.suites import benchmarks
from llmtune.records import Difference

Generator = np.random.Generator
RESAMPLES = 400
SIZES = (2, 5, 8, 20, 60, 200)
TRUTH_ROWS = 40_000
"""Rows that the true scores are computed from."""


@dataclass(frozen=True)
class Rows:
    """The qualities [N, 2] of both models' answers to N rows, and the group of each row, if rows belong together."""

    quality_NQ: Floats  # noqa: N815
    clusters: tuple[int, ...] = ()
    length_N: Floats | None = None  # noqa: N815
    """The rows' lengths; None if they are from 3 to 29."""


# Scenes


def ties(generator: Generator, rows: int) -> Rows:
    """95 % of the answers are equal and nearly perfect; the rest of the tuned model's got worse."""
    base = np.full(rows, 0.97)
    return Rows(np.stack([base, np.where(generator.random(rows) < 0.05, 0.77, base)], 1))


def rare(generator: Generator, rows: int) -> Rows:
    """All answers are right but for a tenth of the tuned model's, which are lost altogether."""
    return Rows(np.stack([np.ones(rows), generator.random(rows) >= 0.1], 1).astype(float))


def between(generator: Generator, rows: int) -> Rows:
    """Answers are partly right, and change either way."""
    base = generator.beta(2, 1, rows)
    tuned = np.where(generator.random(rows) < 0.6, generator.beta(2, 1, rows), base)
    return Rows(np.stack([base, tuned], 1))


def groups(generator: Generator, rows: int) -> Rows:
    """All answers of a group, of one to six rows, are right or wrong together."""
    sizes = generator.integers(1, 7, rows)
    group_N = np.repeat(np.arange(rows), sizes)[:rows]
    right = generator.random((rows, 2)) < (0.9, 0.85)
    return Rows(right[group_N].astype(float), tuple(group_N.tolist()))


def unequal(generator: Generator, rows: int) -> Rows:
    """All answers of a group are right or wrong together; the k-th largest of the groups has 1 / k of the largest."""
    sizes = np.ceil(min(rows, 200) / (1 + np.arange(rows) % 200)).astype(int) if rows < TRUTH_ROWS else 1
    group_N = np.repeat(np.arange(rows), sizes)
    right = generator.random((rows, 2)) < (0.9, 0.8)
    return Rows(right[group_N].astype(float), tuple(group_N.tolist()))


def long(generator: Generator, rows: int) -> Rows:
    """Answers are right or wrong as a whole; few rows have most of the words."""
    right = generator.random((rows, 2)) < (0.9, 0.8)
    return Rows(right.astype(float), length_N=np.ceil(generator.lognormal(2, 1.2, rows)))


SCENES = {scene.__name__: scene for scene in (ties, rare, between, groups, unequal, long)}


# Kinds of metrics: sums per row from qualities


def lengths(generator: Generator, rows: int) -> Floats:
    return generator.integers(3, 30, rows).astype(float)


def ones(values: Floats) -> Floats:
    return np.stack([values, np.ones(len(values))], 1)


def tokens(quality_N: Floats, length_N: Floats) -> Floats:
    return np.stack([quality_N * length_N, length_N], 1)


def some(quality_N: Floats, length_N: Floats) -> Floats:
    counted_N = (length_N > 10).astype(float)
    return np.stack([quality_N * counted_N, counted_N], 1)


def errors(quality_N: Floats, length_N: Floats) -> Floats:
    return np.stack([(1 - quality_N) * length_N, length_N], 1)


def nats(quality_N: Floats, length_N: Floats) -> Floats:
    return np.stack([-np.log(0.02 + 0.97 * quality_N) * length_N, length_N], 1)


def chrf(quality_N: Floats, length_N: Floats) -> Floats:
    counts = 6 * length_N[:, None] - np.arange(6)
    return np.stack([counts, counts, counts * quality_N[:, None]], 2).reshape(len(counts), 18)


def bleu(quality_N: Floats, length_N: Floats) -> Floats:
    grams = np.maximum(length_N[:, None] + 3 - np.arange(4), 0)
    words = length_N[:, None] + 3
    return np.concatenate([words, words, grams * quality_N[:, None], grams], 1)


def found(quality_N: Floats, length_N: Floats) -> Floats:
    right = np.ceil(length_N / 10)
    return np.stack([quality_N * right, right, right], 1)


def classified(quality_N: Floats, length_N: Floats) -> Floats:
    """Three classes, of 80, 16 and 4 % of the rows; a wrong answer is the next class."""
    right_N = np.digitize(length_N, [24.6, 28.9])
    wrong_N = (right_N + 1) % 3
    predicted_NK = np.eye(3)[right_N] * quality_N[:, None] + np.eye(3)[wrong_N] * (1 - quality_N[:, None])
    return np.concatenate([predicted_NK * np.eye(3)[right_N], predicted_NK, np.eye(3)[right_N]], 1)


def ranked(quality_N: Floats, length_N: Floats) -> Floats:
    """Two classes, the second of 20 % of the rows; a low quality moves a row's score to the other class."""
    right_N = (length_N > 24.6).astype(int)
    score_N = np.where(right_N == 1, quality_N, 1 - quality_N) + 0.01 * length_N
    return np.concatenate([np.stack([1 - score_N, score_N], 1), np.eye(2)[right_N]], 1)


def numbered(quality_N: Floats, length_N: Floats) -> Floats:
    return np.stack([quality_N * length_N + (1 - quality_N) * (33 - length_N) * 0.5, length_N], 1)


def squares(quality_N: Floats, length_N: Floats) -> Floats:
    return ones((1 - quality_N) * (1 + length_N / 30))


def brier(quality_N: Floats, length_N: Floats) -> Floats:
    return ones(2 * (1 - quality_N) ** 2)


def of_tasks(quality_N: Floats, length_N: Floats) -> Floats:
    """Three tasks, of 80, 16 and 4 % of the questions."""
    task_N = np.digitize(length_N, [24.6, 28.9])
    return np.stack([np.eye(3)[task_N] * quality_N[:, None], np.eye(3)[task_N]], 2).reshape(len(task_N), 6)


def thumbs(quality_N: Floats, length_N: Floats) -> Floats:
    good = (length_N > 14).astype(float)
    return np.stack([quality_N * good, good, (1 - quality_N) * (1 - good), 1 - good], 1)


def cosines(quality_N: Floats, length_N: Floats) -> Floats:
    return np.stack([np.ones(len(quality_N)), 0.1 + 0.5 * quality_N * length_N / 30], 1)


@dataclass(frozen=True)
class Kind:
    """One kind of metric: how its rows are summed, its formula and its bounds."""

    sums: Callable[[Floats, Floats], Floats]
    formula: metrics.Formula | None = metrics.ratio
    bounds: metrics.Bounds | None = None
    right_wrong: bool = False
    ranking: metrics.RankStatistic | None = None

    def measure(self, quality_N: Floats, length_N: Floats, clusters: tuple[int, ...]) -> Measure:
        quality_N = (quality_N >= 0.5).astype(float) if self.right_wrong else quality_N
        sums, options = self.sums(quality_N, length_N), {"ranking": self.ranking, "bounds": self.bounds}
        return Measure("m", sums, self.formula, self.right_wrong, clusters=clusters, **options)


SHARE = metrics.share_bounds
KINDS = {
    "right or wrong": Kind(lambda quality_N, _: ones(quality_N), bounds=SHARE, right_wrong=True),
    "share": Kind(lambda quality_N, _: ones(quality_N), bounds=SHARE),
    "share of counted": Kind(some, metrics.ratio_of_counted, metrics.share_bounds),
    "share of tokens": Kind(tokens, bounds=SHARE),
    "mean of tasks": Kind(of_tasks, benchmarks.mean_of_ratios, metrics.mean_share_bounds),
    "errors": Kind(errors, texts.error_rate, metrics.error_bounds),
    "ter": Kind(errors, texts.ter_formula, metrics.error_bounds),
    "chrf": Kind(chrf, texts.chrf_formula, metrics.chrf_bounds),
    "bleu": Kind(bleu, texts.bleu_formula, metrics.bleu_bounds),
    "found": Kind(found, classes.f1_formula, metrics.hit_bounds),
    "precision": Kind(found, classes.precision_formula, metrics.hit_bounds),
    "recall": Kind(found, classes.recall_formula, metrics.hit_bounds),
    "f1_micro": Kind(found, classes.f1_macro_formula, metrics.hit_bounds),
    "f1_macro": Kind(classified, classes.f1_macro_formula, metrics.class_bounds),
    "f1_weighted": Kind(classified, classes.f1_weighted_formula, metrics.class_bounds),
    "matthews": Kind(classified, classes.matthews_formula, metrics.class_bounds),
    "area": Kind(ranked, None, metrics.rank_bounds, ranking=classes.second_area),
    "mean area": Kind(ranked, None, metrics.rank_bounds, ranking=classes.mean_area),
    "pearson": Kind(numbered, None, metrics.correlation_bounds, ranking=classes.correlation),
    "spearman": Kind(numbered, None, metrics.correlation_bounds, ranking=classes.rank_correlation),
    "brier": Kind(brier, bounds=metrics.brier_bounds),
    "number": Kind(squares),
    "nats": Kind(nats),
    "perplexity": Kind(nats, texts.exponential_ratio),
    "apart": Kind(thumbs, metrics.difference_of_ratios),
    "effective rank": Kind(cosines, metrics.rows_by_squares),
}


def draw(kind: Kind, scene: str, generator: Generator, rows: int) -> list[Measure]:
    """Return the measures of base and tuned model on new rows."""
    drawn = SCENES[scene](generator, rows)
    length_N = lengths(generator, len(drawn.quality_NQ)) if drawn.length_N is None else drawn.length_N
    return [kind.measure(quality_N, length_N, drawn.clusters) for quality_N in drawn.quality_NQ.T]


@cache
def true_scores(kind: str, scene: str) -> tuple[float, float]:
    """Return the scores of base and tuned model on very many rows."""
    base, tuned = draw(KINDS[kind], scene, np.random.default_rng(99), TRUTH_ROWS)
    return base.value, tuned.value


def count_errors(kind: str, scene: str, rows: int, trials: int, *, paired: bool) -> tuple[int, int]:
    """Return how many intervals are above the true value, and how many below it."""
    base, tuned = true_scores(kind, scene)
    true, generator = tuned - base * paired, np.random.default_rng(rows)
    above = below = 0
    for _ in range(trials):
        models = draw(KINDS[kind], scene, generator, rows)
        change: Difference = paired_difference(*models, seed=0) if paired else own_interval(models[1], seed=0)
        above += change.low > true + 1e-9 * abs(true)
        below += change.high < true - 1e-9 * abs(true)
    return above, below
