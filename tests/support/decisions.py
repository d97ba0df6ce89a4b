"""Simulate decisions with a guarantee: `PYTHONPATH=tests python -m support.decisions` prints the tables of the docs.

A population has rows with logits and right labels. Validation rows are drawn from it with replacement, so the error
rate of every threshold is known exactly. Shapes: P rows of the population, K labels, N drawn rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.calibration import Chosen, fit_temperature, log_probabilities
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.selective_prediction import prove_risk

RISK, CONFIDENCE = 0.05, 0.95
ROWS = (50, 100, 200, 500, 1000, 2000)
SIGNALS = {0.05: 3.84, 0.15: 2.42, 0.30: 1.55}
"""By the error rate of all answers, the distance of the right logit from the others, in standard deviations."""
SIZE, LABELS, OVERCONFIDENCE = 100_000, 4, 2.5
CHECKPOINTS, NOISE = 10, 1.0
RESAMPLES = 1000


@dataclass(frozen=True)
class Population:
    """All rows that a model may meet."""

    logits_PK: Floats  # noqa: N815
    labels_P: NDArray[np.int64]  # noqa: N815

    def draw(self, rows: int, generator: np.random.Generator) -> Population:
        """Draw rows with replacement."""
        return self.take(generator.integers(0, len(self.labels_P), rows))

    def take(self, at_N: NDArray[np.int64] | slice) -> Population:
        """Return some rows."""
        return Population(self.logits_PK[at_N], self.labels_P[at_N])

    def answers(self, temperature: float = 1.0) -> tuple[Floats, NDArray[np.bool_]]:
        """Return the confidence of each answer, and whether it is wrong."""
        logs_PK = log_probabilities(self.logits_PK / temperature, many=False)
        return np.exp(logs_PK.max(1)), np.asarray(logs_PK.argmax(1) != self.labels_P)

    def nll(self) -> float:
        """Return the mean negative log-likelihood of the right labels."""
        return -float(
            log_probabilities(self.logits_PK, many=False)[np.arange(len(self.labels_P)), self.labels_P].mean()
        )

    def temperature(self) -> float:
        """Fit the temperature on these rows."""
        right_PK = np.eye(LABELS, dtype=bool)[self.labels_P]
        return fit_temperature(Chosen(tuple("abcd"), self.logits_PK, right_PK, tuple(range(len(self.labels_P)))))


@cache
def make_population(error: float, shift: float = 0.0) -> Population:
    """Return the rows of an overconfident model with this error rate; `shift` lowers the right logits on each row."""
    generator = np.random.default_rng(0)
    labels_P = generator.integers(0, LABELS, SIZE)
    logits_PK = generator.normal(size=(SIZE, LABELS))
    logits_PK[np.arange(SIZE), labels_P] += SIGNALS[error] * generator.uniform(0.4, 1.6, SIZE) - shift
    return Population(OVERCONFIDENCE * logits_PK, labels_P)


@cache
def make_checkpoints(error: float) -> tuple[Population, ...]:
    """Return checkpoints of one training: equally good, each with errors of its own."""
    population, generator = make_population(error), np.random.default_rng(1)
    noise_CPK = generator.normal(size=(CHECKPOINTS, SIZE, LABELS)) * NOISE * OVERCONFIDENCE
    return tuple(Population(population.logits_PK + noise_PK, population.labels_P) for noise_PK in noise_CPK)


@dataclass(frozen=True)
class Truth:
    """The error rate above each threshold, for all rows of a population."""

    confidence_P: Floats  # noqa: N815
    """Descending."""
    errors_P: Floats  # noqa: N815
    """Cumulative."""

    @classmethod
    def of(cls, population: Population, temperature: float = 1.0) -> Truth:
        """Sort the rows of a population."""
        confidence_P, wrong_P = population.answers(temperature)
        order_P = np.argsort(-confidence_P)
        return cls(confidence_P[order_P], np.cumsum(wrong_P[order_P]).astype(float))

    def at(self, threshold: float | None) -> tuple[float, float]:
        """Return the share of rows above a threshold, and the share of errors among them."""
        kept = 0 if threshold is None else int(np.searchsorted(-self.confidence_P, -threshold, side="right"))
        return kept / len(self.confidence_P), float(self.errors_P[kept - 1]) / kept if kept else 0.0


@dataclass(frozen=True)
class Outcome:
    """What happened in all resamples."""

    held: float
    """Share whose true error is at most the risk; deciding nothing counts."""
    decided: float
    """Mean share of decided rows."""
    nothing: float
    """Share that decide nothing."""
    error: float
    """Mean true error where something is decided."""
    worst: float
    """The true error that 95 % do not exceed."""


def summarize(found: list[tuple[float, float]]) -> Outcome:
    """Return the outcome of resamples, each with the share decided and the error."""
    decided_R, error_R = np.array(found).T
    some_R = decided_R > 0
    mean = float(error_R[some_R].mean()) if some_R.any() else 0.0
    return Outcome(
        float((error_R <= RISK).mean()),
        float(decided_R.mean()),
        float(1 - some_R.mean()),
        mean,
        float(np.quantile(error_R, 0.95)),
    )


def decide_as(error: float, rows: int, how: str, resamples: int, shift: float = 0.0) -> Outcome:
    """Find thresholds on resampled validation rows, and measure them on the population.

    `how` is `raw` (at temperature 1), `same` (temperature and threshold on the same rows), `halves` (the temperature on
    one half), `chosen` (the checkpoint with the lowest loss on these rows) or `divided` (the same, with the error of
    the guarantee divided by the number of checkpoints).
    """
    generator, confidence = np.random.default_rng(rows), CONFIDENCE
    models = make_checkpoints(error) if how in ("chosen", "divided") else (make_population(error),)
    if how == "divided":
        confidence = 1 - (1 - CONFIDENCE) / CHECKPOINTS
    truths = [Truth.of(make_population(error, shift) if shift else model) for model in models]
    found = []
    for _ in range(resamples):
        at_N = generator.integers(0, SIZE, rows)
        drawn = [model.take(at_N) for model in models]
        best = int(np.argmin([one.nll() for one in drawn])) if len(drawn) > 1 else 0
        validation, temperature = drawn[best], 1.0
        if how in ("same", "halves"):
            temperature = (validation if how == "same" else validation.take(slice(rows // 2))).temperature()
            validation = validation if how == "same" else validation.take(slice(rows // 2, None))
        threshold = prove_risk(*validation.answers(temperature), RISK, confidence)
        truth = truths[best] if temperature == 1.0 else Truth.of(models[best], temperature)
        found.append(truth.at(threshold.value))
    return summarize(found)


def main() -> None:
    """Print the tables; `python -m support.decisions raw` only the first."""
    for how, shift in (("raw", 0.0), ("raw", 0.5), ("same", 0.0), ("halves", 0.0), ("chosen", 0.0), ("divided", 0.0)):
        if how not in (sys.argv[1:] or (how,)):
            continue
        print(f"\n{how}, shift {shift}")
        for error in SIGNALS:
            for rows in ROWS if how == "raw" else (200, 1000):
                one = decide_as(error, rows, how, RESAMPLES if how == "raw" else RESAMPLES // 2, shift)
                numbers = " | ".join(f"{100 * value:.1f}" for value in vars(one).values())
                print(f"| {100 * error:.0f} % | {rows:,} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
