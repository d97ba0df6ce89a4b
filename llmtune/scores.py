"""What an evaluation found, frozen: scores, differences, gates, flips, slices, and what else both models were asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Difference:
    """Tuned minus base on the same rows: value, 95 % interval, two-sided p, number of rows."""

    value: float
    low: float
    high: float
    p: float
    n: int
    test: str = ""
    """Where p comes from: `McNemar exact` or `paired bootstrap`; empty where there is none."""


@dataclass(frozen=True)
class Flips:
    """Rows that one model got right and the other wrong, by one right-or-wrong metric."""

    gained: int
    """How many the base got wrong and the tuned model right."""
    lost: int
    """How many the base got right and the tuned model wrong."""
    rows: int
    gained_rows: tuple[dict[str, str], ...] = ()
    """A few of them, as in `Evaluation.samples`."""
    lost_rows: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Slice:
    """The test rows with one value of a column, and the scores on them."""

    value: str
    rows: int
    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    """By metric; without an interval where the rows are too few for one."""


@dataclass(frozen=True)
class GateResult:
    """One gate: the expression, what was wanted, what was got."""

    name: str
    wanted: str
    got: str
    passed: bool


@dataclass(frozen=True)
class StudyTable:
    """A table that a study shows beside its scores; cells are text that a person reads."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Study:
    """What base and tuned model were asked beyond the test rows: forgetting, fairness, benchmarks.

    Metrics have plain names here; gates call them `study.metric`.
    """

    title: str
    base: dict[str, float]
    """Empty where the base model could not be asked."""
    tuned: dict[str, float]
    difference: dict[str, Difference]
    meanings: dict[str, str]
    """By metric, a few words for a person."""
    better: dict[str, int]
    """By metric: 1 where more is better, -1 where less is, 0 where neither is."""
    signatures: dict[str, str] = field(default_factory=dict)
    """How a metric was computed."""
    limits: str = ""
    """In plain words, what these numbers can show and what they cannot."""
    tables: tuple[StudyTable, ...] = ()


@dataclass(frozen=True)
class Contamination:
    """Test rows that stand in the training rows, in one way or another; a row counts in each way that it does."""

    rows: int
    """Test rows."""
    train_rows: int
    equal: int
    near: int
    short: int
    """Test rows of fewer than 13 words."""
    worded: int
    """Of those, rows whose words are all those of a training row, in order."""
    shared: int
    """Of the others, rows that have 13 words in a row in common with a training row."""
    overlapping: int
    """Test rows that overlap in any of these ways."""
    common: int
    """Runs of 13 words of the test rows that were left out, since more than ten training rows have them."""
    dropped: dict[str, int]
    """Rows that were left out when rows were prepared since they were too like a test row, by reason."""
    examples: tuple[dict[str, str], ...]
    """A few that overlap: kind, where the test row and the training row stand, what they share."""
    scores: tuple[Slice, ...]
    """Both models on the clean rows and on those that overlap; empty where none does."""


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned model on the same held-out rows."""

    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    gates: tuple[GateResult, ...]
    samples: tuple[dict[str, str], ...]
    """A few rows side by side: prompt, reference, base, tuned."""
    rows: int
    signatures: dict[str, str] = field(default_factory=dict)
    """How a metric was computed, e.g. sacrebleu's signature."""
    baseline: str | None = None
    """Where the base model has no trained head: what stands in its place, by name."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a task shows beside the scores, of base and tuned: a table of classes, a confusion matrix."""
    flips: dict[str, Flips] = field(default_factory=dict)
    """By right-or-wrong metric."""
    slices: dict[str, tuple[Slice, ...]] = field(default_factory=dict)
    """By column of `evaluate.slices`: the most frequent values first."""
    studies: dict[str, Study] = field(default_factory=dict)
    """By name: forgetting, fairness, benchmarks; those that the recipe asks for."""
    contamination: Contamination | None = None
    """None without test rows."""

    def by_name(self, side: str) -> dict[str, float]:
        """Return the scores of `base` or `tuned` by the names that gates use, those of the studies among them."""
        scores = dict(getattr(self, side))
        for name, study in self.studies.items():
            scores |= {f"{name}.{metric}": value for metric, value in getattr(study, side).items()}
        return scores

    def differences(self) -> dict[str, Difference]:
        """Return the differences by the names that gates use."""
        found = dict(self.difference)
        for name, study in self.studies.items():
            found |= {f"{name}.{metric}": value for metric, value in study.difference.items()}
        return found
